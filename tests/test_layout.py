"""Checks which folder imports which, by reading the import statements of every file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"scconv_jax", "train", "configs", "benchmarks", "tests"}

# Files directly in scconv_jax/ that import nothing else of it; every folder may import them.
SHARED = {"files", "images", "messages", "programs", "shapes"}
# For each folder, the other folders of its package that it may import.
LIBRARY = {
    "functional": set(),
    "layers": {"functional"},
    "models": {"functional", "layers"},
    "weights": set(),
    "fusion": {"functional", "layers"},
    "interop": {"functional", "layers", "models", "weights", "fusion"},
    "inference": {"", "functional", "layers", "models", "weights", "interop", "fusion"},
    "explanation": {"functional", "layers", "models", "interop", "inference"},
    "cli": {"", "layers", "models", "weights", "interop", "inference", "explanation"},
}
TRAINER = {"config": set(), "data": {"config"}, "run": {"config"}, "report": {"", "config", "data", "run"}}

LIBRARY_NEEDS = {"jax", "flax", "numpy", "ml_dtypes", "rich", "safetensors"}  # ml_dtypes is jax's, rich flax's
LATE_OF = {  # optional packages that a file may import inside a function
    "cli/predict.py": {"PIL"},
    "explanation/page.py": {"PIL"},
    "explanation/pictures.py": {"PIL"},
    "images.py": {"PIL"},
    "inference/export.py": {"onnxruntime"},
    "inference/onnx_conversion.py": {"onnx"},
    "inference/onnx_graph.py": {"onnx"},
    "inference/onnx_operations.py": {"onnx"},
    "cli/explain.py": {"PIL"},
    "interop/references.py": {"torch"},
    "interop/torch_networks.py": {"torch"},
    "interop/verification.py": {"torch"},
    "shapes.py": {"jaxtyping"},
    "weights/runs.py": {"orbax"},
}
LATE_ONLY = {
    "matplotlib",
    "onnx",
    "onnxruntime",
    "sklearn",
    "tensorboardX",
    "wandb",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
}


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def folder(path):
    """Returns `weights` for `scconv_jax/weights/files.py`, and "" for a file directly in the package."""
    return "/".join(path.relative_to(ROOT).parts[1:-1])


def imports(path):
    """Returns each dotted name that a file imports, and whether it does so at the top level."""
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


def folders(path, package):
    """Returns the folders of `package` that a file imports, with "" for files directly in the package."""
    known = {folder(file) for file in files(package)}
    parts = [name.split(".") for name, _ in imports(path)]
    found = {part[1] if len(part) > 1 else "" for part in parts if part[0] == package} - SHARED
    return {name if name in known else "" for name in found}


def ours(path):
    return {name.split(".")[0] for name, _ in imports(path)} & OURS


def others(path):
    return {name.split(".")[0] for name, _ in imports(path)} - OURS - sys.stdlib_module_names


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files("scconv_jax"), ids=relative)
def test_library_imports_follow_the_layout(path):
    assert ours(path) <= {"scconv_jax"}
    late = LATE_OF.get(relative(path).removeprefix("scconv_jax/"), set())
    assert others(path) <= LIBRARY_NEEDS | late, "the library depends on LIBRARY_NEEDS alone; LATE_OF lists the optional packages"
    if folder(path):
        assert folders(path, "scconv_jax") <= LIBRARY[folder(path)] | {folder(path)}
    elif path.stem in SHARED:
        assert folders(path, "scconv_jax") == set()


@pytest.mark.parametrize("path", files("scconv_jax/functional"), ids=relative)
def test_functional_imports_no_flax(path):
    assert others(path) <= {"jax", "numpy"}


@pytest.mark.parametrize("path", files("train"), ids=relative)
def test_trainer_imports_follow_the_layout_and_use_public_names(path):
    assert ours(path) <= {"train", "scconv_jax"}
    if folder(path):
        assert folders(path, "train") <= TRAINER[folder(path)] | {folder(path)}
    names = [name for name, _ in imports(path) if name.split(".")[0] == "scconv_jax"]
    assert set(names) <= {"scconv_jax"}, "write scconv_jax.NAME"
    public = set(exported(ROOT / "scconv_jax" / "__init__.py"))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "scconv_jax":
            assert node.attr in public, f"line {node.lineno}: scconv_jax.{node.attr} is not public"


@pytest.mark.parametrize("path", files("configs"), ids=relative)
def test_configs_import_train_config_only(path):
    assert {".".join(name.split(".")[:2]) for name, _ in imports(path)} == {"train.config"}


@pytest.mark.parametrize("path", files("train") + files("scconv_jax"), ids=relative)
def test_heavy_packages_are_imported_inside_functions(path):
    assert not {name.split(".")[0] for name, top in imports(path) if top} & LATE_ONLY


@pytest.mark.parametrize("package", ["scconv_jax", "train"])
def test_files_and_folders_stay_small(package):
    for path in files(package):
        assert len(path.read_text().splitlines()) <= 350, f"{relative(path)} has more than 350 lines: split it"
        assert len(list(path.parent.glob("*.py"))) <= 12, f"{relative(path.parent)} has more than 12 modules: split it"


def exported(path):
    """Returns the names in `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no __all__")


def test_every_form_of_import_is_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import train.run.workdir\nfrom train import loop\nfrom scconv_jax import models\n"
        "def f():\n    from scconv_jax.interop.loading import load_model\n    import torch.nn\n"
    )
    assert folders(path, "train") == {"run", ""}
    assert folders(path, "scconv_jax") == {"models", "interop"}
    assert others(path) == {"torch"}
    assert ("torch.nn", False) in imports(path)
    assert ("train.run.workdir", True) in imports(path)
