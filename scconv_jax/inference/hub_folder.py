"""A folder in the form of the Hugging Face hub: weights, a description for programs, and a model card for people.

model.safetensors    the variables, with Flax's keys, and the metadata that `load_run` reads
config.json          network, options, `id2label`, preparation of images
README.md            the model card: only what is recorded or counted; what is not known is not said
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scconv_jax import files
from scconv_jax.inference.onnx_conversion import ExportError
from scconv_jax.inference.run import TrainedModel, open_run
from scconv_jax.interop.variables import save
from scconv_jax.messages import printable, shortened
from scconv_jax.models.complexity import multiply_adds
from scconv_jax.weights import WeightsError, runs

FILES = ("model.safetensors", "config.json", "README.md")
_SHOWN_CLASSES = 50  # most names in the model card


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says about its training; None or empty where it says nothing."""

    name: str = ""
    data: str = ""
    step: int | None = None
    epochs: int | None = None
    top1: float | None = None
    date: str = ""


def read_record(folder: Path, checkpoint: str | int) -> RunRecord:
    """Return what a run's folder records about the training and test of a checkpoint."""
    step = runs.choose_step(folder, checkpoint) if folder.is_dir() and runs.steps(folder) else None
    if step is None:
        return RunRecord()
    try:
        config = json.loads((folder / "config.json").read_bytes())
        data, epochs = config["data"], config.get("epochs")
        name = "/".join(str(data[key]) for key in ("name", "tfds_name") if data.get(key))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        name, epochs = "", None
    try:
        saved = (folder / "checkpoints" / str(step)).stat().st_mtime
        date = time.strftime("%Y-%m-%d", time.gmtime(saved))
    except OSError:
        date = ""
    epochs = epochs if isinstance(epochs, int) else None
    return RunRecord(folder.resolve().name, name, step, epochs, runs.eval_top1(folder, step), date)


def write(path: Path, trained: TrainedModel, record: RunRecord) -> int:
    """Write the folder, whole or not at all, and return its size in bytes. An existing folder gets the three files anew.

    Raises:
        WeightsError: The folder cannot be written.
        ExportError: The folder, loaded back, has other weights, names or preparation.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        config = _config(trained)
        metadata = {"model": trained.name, "arguments": dict(trained.options), "preparation": asdict(trained.preparation)}
        metadata |= {} if trained.class_names is None else {"class_names": list(trained.class_names)}
        metadata |= {} if record.step is None else {"step": str(record.step)}
        save(temporary / FILES[0], trained.variables, {**metadata, "version": f"scconv_jax {config['scconv_jax_version']}"})
        write_json(temporary / FILES[1], config)
        (temporary / FILES[2]).write_text(_card(path.name, trained, record), encoding="utf-8", errors="backslashreplace")
        _check(temporary, trained)
        size = sum(file.stat().st_size for file in temporary.iterdir())
        if not path.exists():
            temporary.rename(path)
        else:
            for name in FILES:
                with files.replacing(path / name) as new:
                    new.write_bytes((temporary / name).read_bytes())
    except OSError as error:
        raise WeightsError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Write a JSON file in UTF-8. What UTF-8 cannot have, from the names of folders, becomes JSON's escape of it."""
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")


def _check(folder: Path, trained: TrainedModel) -> None:
    found = open_run(folder)
    same = jax.tree.structure(found.variables) == jax.tree.structure(trained.variables) and all(
        np.array_equal(ours, theirs, equal_nan=True)
        for ours, theirs in zip(jax.tree.leaves(found.variables), jax.tree.leaves(trained.variables), strict=True)
    )
    options = json.loads(json.dumps({**found.options, **trained.options}))  # of the file, and perhaps of the head
    if not same or (found.name, json.loads(json.dumps(found.options))) != (trained.name, options):
        raise ExportError("The folder, loaded back, gives another network. Nothing was written.")
    if (found.class_names, found.preparation) != (trained.class_names, trained.preparation):
        raise ExportError("The folder, loaded back, has other class names or another preparation. Nothing was written.")


def _config(trained: TrainedModel) -> dict[str, Any]:
    from scconv_jax import __version__

    names = trained.readable_names
    return {
        "library_name": "scconv_jax",
        "scconv_jax_version": __version__,
        "architecture": trained.name,
        "arguments": dict(trained.options),
        "num_classes": len(names),
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "preparation": asdict(trained.preparation),
    }


def _card(title: str, trained: TrainedModel, record: RunRecord) -> str:
    """Return the model card. Names come from users, so they stand in code blocks and as JSON, which YAML reads."""
    names, preparation = trained.readable_names, trained.preparation
    size, count = preparation.size, sum(np.size(leaf) for leaf in jax.tree.leaves(trained.variables["params"]))
    header: dict[str, Any] = {
        "library_name": "scconv_jax",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "jax", "flax", "scconv_jax", trained.name],
    }
    if record.top1 is not None:
        task = {"type": "image-classification"}
        metric = {"type": "accuracy", "value": round(100 * record.top1, 2), "name": "top-1, percent"}
        dataset = {"name": record.data or "not recorded", "type": record.data or "not recorded"}
        header["model-index"] = [{"name": title, "results": [{"task": task, "dataset": dataset, "metrics": [metric]}]}]
    facts = {
        "network": f"`{trained.name}`" + _options(trained.options),
        "parameters": f"{count:,}",
        "multiply-adds": f"{multiply_adds(trained.model, (size, size)):,} for an image of {size}×{size} px",
        "classes": str(len(names)),
        "data": _code(record.data),
        "test accuracy (top-1)": "" if record.top1 is None else f"{record.top1:.2%}",
        "checkpoint": "" if record.step is None else f"step {record.step:,}",
        "epochs of the run": "" if record.epochs is None else str(record.epochs),
        "date of the checkpoint": record.date,
    }
    images = (
        f"Resize the shorter side to {preparation.resize} px, crop the central {size}×{size} px, scale to 0..1, subtract the "
        f"mean {_numbers(preparation.mean)} and divide by the standard deviation {_numbers(preparation.std)}."
    )
    known = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value)
    unknown = [key for key, value in facts.items() if not value]
    listed = "\n".join(
        f"    {label}: {printable(json.dumps(shortened(name), ensure_ascii=False))}"
        for label, name in enumerate(names[:_SHOWN_CLASSES])
    )
    more = f"\n\n`id2label` in `config.json` has all {len(names)}." if len(names) > _SHOWN_CLASSES else ""
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items())
    return f"""---
{front}
---

# {trained.name}

An image classifier. The table says what is recorded or was counted{f"; not recorded: {', '.join(unknown)}" if unknown else ""}.

| | |
|---|---|
{known}

## Use

```python
import scconv_jax

trained = scconv_jax.load_run("FOLDER")        # this folder, on your machine
trained.predict(["photo.jpg"])
model, variables = scconv_jax.load_model("FOLDER")
```

## Images

{images} `load_run` does this.{_if_assumed(trained, "its images", " This is not recorded but assumed.")}

## Classes

{_if_assumed(trained, "classes", f"These names are not recorded but assumed.{chr(10) * 2}")}{listed}{more}
"""


def _if_assumed(trained: TrainedModel, what: str, text: str) -> str:
    return text if any(what in note and "assumed" in note for note in trained.notes) else ""


def _options(options: Mapping[str, Any]) -> str:
    return "".join(f", `{key}={value}`" for key, value in options.items())


def _code(text: str) -> str:
    """Return text of a user as code in a table of Markdown, which cannot begin anything else."""
    plain = "".join(letter for letter in text if letter.isprintable() and letter not in "`|")
    return f"`{plain}`" if plain else ""


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
