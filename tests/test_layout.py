"""Who may import whom: read off the files, so that an edge against the direction of the layout fails."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"scconv_jax", "train", "configs", "benchmarks", "tests"}

# A file imports only files of lower ranks: functions, layers, operators, networks, the table of them, what uses it.
LIBRARY = {
    "console": 0, "variants": 0, "torch_side": 0, "torch_ghostnet": 1, "published": 0, "spatial": 0, "functional": 1, "layers": 2,
    "self_calibrated": 3, "reconstruction": 3, "ghost": 3, "squeeze_excitation": 3,
    "blocks": 4, "resnet": 5, "scnet": 6, "scconv_resnet": 6, "wide_resnet": 6, "densenet": 6, "ghostnet": 6,
    "models": 7, "summary": 8, "recognise": 8, "pretrained": 9, "verify": 10,
    "cli.summary": 11, "cli.convert": 11, "cli.verify": 12, "cli": 13, "__main__": 14,
}  # fmt: skip
# They know arrays, names and files, not networks.
ABOVE_NO_NETWORK = {
    "convert": 0, "naming": 1, "weights.files": 0, "weights.pickles": 1, "weights.state_dicts": 2, "weights.torch_files": 3,
    "weights.safetensors_files": 3, "weights.runs": 3, "weights.torch_process": 0,
    "weights.formats": 4, "weights.download": 4, "weights": 5, "weights.second_reader": 5,
}  # fmt: skip
TRAINER = {
    "fields": 0, "randaugment": 0, "config": 1, "config_files": 2,
    "augment": 3, "optim": 3, "step": 3, "checkpoint": 3, "workdir": 3, "trackers": 3, "speed": 3, "hosts": 3,
    "batches": 3, "images": 4, "folder": 4, "tfds": 4, "records": 5, "data": 6, "prepare": 7,
    "log": 4, "parallel": 4, "start": 5, "job": 7, "loop": 8, "main": 9,
}  # fmt: skip

LIBRARY_NEEDS = {"jax", "flax", "numpy", "ml_dtypes", "rich", "safetensors", "jaxtyping"}  # ml_dtypes is jax's, rich flax's
LATE_ONLY = {"matplotlib", "sklearn", "tensorboardX", "wandb", "tensorflow", "tensorflow_datasets", "torch"}


def files(package):
    """All but the package's own `__init__.py`; those of packages within it belong."""
    return sorted(path for path in (ROOT / package).rglob("*.py") if path != ROOT / package / "__init__.py")


def dotted(path):
    """`scconv_jax/weights/files.py` → `weights.files`, `scconv_jax/weights/__init__.py` → `weights`."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Dotted names of what a file imports: (name, whether at the top level)."""
    tree = ast.parse(path.read_text(), str(path))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}, line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node in tree.body) for name in names]
    return found


def modules(path, package):
    """Files of `package` that a file imports, dotted as above; "" for the package itself."""
    known = {dotted(file) for file in files(package)} | {""}
    found = set()
    for name, _ in imports(path):
        top, *parts = name.split(".")
        if top == package:
            found.add(max({".".join(parts[:n]) for n in range(len(parts) + 1)} & known, key=len))
    return found


def ours(path):
    return {name.split(".")[0] for name, _ in imports(path)} & OURS


def others(path):
    return {name.split(".")[0] for name, _ in imports(path)} - OURS - sys.stdlib_module_names


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files("scconv_jax"), ids=relative)
def test_the_library_points_downwards(path):
    assert ours(path) <= {"scconv_jax"}
    name, used = dotted(path), modules(path, "scconv_jax")
    of_torch = {late: {"torch"} for late in ("weights.torch_process", "torch_side", "verify")}
    late = (of_torch | {"weights.runs": {"orbax"}}).get(name, set())
    assert others(path) <= LIBRARY_NEEDS | late, "an optional or foreign package; the library needs these alone"
    if name in ABOVE_NO_NETWORK:
        assert used <= {other for other, rank in ABOVE_NO_NETWORK.items() if rank < ABOVE_NO_NETWORK[name]}
    else:
        assert name in LIBRARY, "a new file: give it a rank above"
        allowed = {other for other, rank in LIBRARY.items() if rank < LIBRARY[name]}
        allowed |= set(ABOVE_NO_NETWORK) if LIBRARY[name] > LIBRARY["models"] else set()
        assert used <= allowed | ({""} if name in ("cli", "cli.convert") else set())


@pytest.mark.parametrize("name", ["spatial", "functional"])
def test_the_pure_functions_know_no_flax(name):
    assert others(ROOT / "scconv_jax" / f"{name}.py") <= {"jax", "numpy", "jaxtyping"}


@pytest.mark.parametrize("path", files("train"), ids=relative)
def test_the_trainer_points_downwards_and_uses_the_library_by_its_public_names(path):
    assert ours(path) <= {"train", "scconv_jax"}
    assert path.stem in TRAINER, "a new file: give it a rank above"
    assert modules(path, "train") <= {name for name, rank in TRAINER.items() if rank < TRAINER[path.stem]}
    names = [name for name, _ in imports(path) if name.split(".")[0] == "scconv_jax"]
    assert set(names) <= {"scconv_jax"}, "write scconv_jax.NAME"
    public = set(exported(ROOT / "scconv_jax" / "__init__.py"))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "scconv_jax":
            assert node.attr in public, f"line {node.lineno}: scconv_jax.{node.attr} is not public"


@pytest.mark.parametrize("path", files("configs"), ids=relative)
def test_configs_know_only_what_a_config_is(path):
    assert {".".join(name.split(".")[:2]) for name, _ in imports(path)} == {"train.config"}


@pytest.mark.parametrize("path", files("train") + files("scconv_jax"), ids=relative)
def test_heavy_packages_are_imported_where_they_are_used(path):
    assert not {name.split(".")[0] for name, top in imports(path) if top} & LATE_ONLY


def exported(path):
    """The names in `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no __all__")


def test_the_check_sees_what_it_should(tmp_path):
    """Each way to write an import is seen."""
    path = tmp_path / "x.py"
    path.write_text(
        "import train.step\nfrom train import loop\ndef f():\n    from scconv_jax.resnet import ResNet\n    import torch.nn\n"
    )
    assert modules(path, "train") == {"step", "loop"}
    assert modules(path, "scconv_jax") == {"resnet"}
    assert others(path) == {"torch"}
    assert ("torch.nn", False) in imports(path)
    assert ("train.step", True) in imports(path)
