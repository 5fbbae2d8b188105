"""Every public name has a docstring with shapes and source, and stands in the reference."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

import scconv_jax

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")}


def _extension(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sys.path.append(str(ROOT / "docs" / "extensions"))  # the extensions import one another
reference = _extension("reference")
NAMES = [name for module in reference.public_modules() for name in reference.public_names(module)]
CODE = [name for name in NAMES if inspect.isroutine(name.value) or (isinstance(name.value, type) and name.docstring)]
SHAPE = re.compile(r"\((n|h|w|c|k|kh|o|1|2|size|features|rows|\*|\.\.\.)[ ,][^()]*\)|\bshapes?\b|\bscalar\b")
PAPER = re.compile(r"\b(CVPR|ICCV|ECCV|BMVC|NeurIPS|ICLR)\b[ ,]*(20\d\d)")


def label(name):
    return f"{name.module}.{name.name}"


def arrays(code) -> bool:
    """Returns whether arrays go in or out of a function, by its annotations."""
    return any(re.search(r"\b(Array|ndarray)\b", str(annotation)) for annotation in getattr(code, "__annotations__", {}).values())


@pytest.mark.parametrize("name", NAMES, ids=label)
def test_every_public_name_has_a_docstring(name):
    first = name.docstring.split("\n\n")[0]
    assert first.endswith((".", ":")), f"{name.file}, line {name.line}: the docstring needs a first sentence"


@pytest.mark.parametrize("name", CODE, ids=label)
def test_arrays_have_shapes(name):
    code = [name.value] if not isinstance(name.value, type) else list(reference.methods(name.value).values())
    text = name.docstring + "".join(inspect.getdoc(method) or "" for method in code)
    assert not any(arrays(method) for method in code) or SHAPE.search(text), f"{name.file}, line {name.line}: which shapes?"


@pytest.mark.parametrize("name", CODE, ids=label)
def test_what_comes_from_a_paper_names_it(name):
    """If the file opens with a paper, so does each public name in it."""
    opening = (inspect.getdoc(inspect.getmodule(name.value)) or "") if name.module != "scconv_jax.images" else ""
    years = {year for _, year in PAPER.findall(opening)}
    assert not years or years & set(re.findall(r"\b20\d\d\b(?!-)", name.docstring)), (
        f"{name.file}, line {name.line}: which paper?"
    )


def test_the_reference_has_every_module_and_name():
    text = "\n".join(reference.expand(page, f"reference/{stem}") for stem, page in PAGES.items())
    for module in reference.public_modules():
        assert f"<!-- names: {module} -->" in "".join(PAGES.values()), f"docs/reference has no page with {module}"
    entries = set(re.findall(r"^\.\. py:\w+:: (\w+).*\n   :module: (\S+)$", text, re.MULTILINE))
    for name in NAMES:
        home = "scconv_jax" if name.name in scconv_jax.__all__ else name.module
        assert (name.name, home) in entries
        assert f"`{name.name} <{home}.{name.name}>`" in text


def test_the_reference_has_every_field_and_command():
    fields = reference.expand(PAGES["config"], "reference/config")
    for flag in ("--optim.lr", "--data.batch-size", "--epochs", "--workdir"):
        assert f"`{flag}`" in fields
    from train.config.schema import Config

    for group, value in vars(Config()).items():
        for field in vars(value) if hasattr(value, "__dataclass_fields__") else ():
            assert f"`--{group}.{field}`".replace("_", "-") in fields
    from scconv_jax.cli import _parser

    assert "| `-a`, `--arch` | `--model.name` |" in fields
    text = reference.expand(PAGES["commands"], "reference/commands")
    assert r"| `IMAGE\|DIR` |" in text  # a bar within a cell does not end it
    assert re.findall(r"^## `(\S+)`$", text, re.MULTILINE) == list(_parser()._subparsers._group_actions[0].choices)


def test_indented_blocks_of_docstrings_become_code():
    lines = reference.restructured("First.\n\n    x = 1\n\nArgs:\n    a: A number.\n")
    assert lines[:5] == ["First.", "", "::", "", "    x = 1"]
    assert ":param a: A number." in lines


def test_code_that_is_no_name_keeps_its_first_character():
    text = "Takes `.pth`, `module.` and `(n, h)`; see `load` and `images.prepare`."
    assert reference.restructured(text)[0] == "Takes ``.pth``, ``module.`` and ``(n, h)``; see `load` and `images.prepare`."


def test_what_is_returned_stays_as_it_is_written():
    lines = reference.restructured('First.\n\nReturns:\n    `{"layer1": (n, h, w, c)}`, a map: the last.\n')
    assert ':returns: ``{"layer1": (n, h, w, c)}``, a map: the last.' in lines


def test_signatures_can_be_read():
    for name in CODE:
        signature = reference._signature(name.value)
        assert " at 0x" not in signature, label(name)
        assert "ForwardRef" not in signature, label(name)
        assert not isinstance(name.value, type) or "->" not in signature, label(name)
