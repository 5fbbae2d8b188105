"""Writes the reference from the code: public names, fields of a config, commands.

A page of the reference holds a marker, such as `<!-- names: scconv_jax.functional -->`, and Sphinx reads the page with the
marker replaced. The names come from `__all__`, so a new one cannot be missing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flag_tables import commands, fields, short_names, string_of, table

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"^<!-- (\w+)(?:: (\S+))? -->$", re.MULTILINE)
CODE = re.compile(r"(?<![`:\w])`([^`\n]+)`(?!`)")
NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*(\(\))?")
# Headings of the names in `scconv_jax`, by the folder or file that defines them, in this order.
SECTIONS = {
    "layers": "Layers",
    "models": "Networks",
    "interop": "Weights: loading and conversion",
    "weights": "Weights: files",
    "finetuning": "Fine-tuning",
    "reports": "Parameters and multiply-adds",
    "bridge": "NNX",
    "fusion": "Fusing",
    "inference": "Inference and export",
    "explanation": "Explanation",
    "programs": "Compiled programs",
}


class Name(NamedTuple):
    """A public name: where it is imported from, the object, and the file and line that define it."""

    module: str
    name: str
    value: Any
    file: Path
    line: int
    docstring: str


def public_names(module: str) -> list[Name]:
    """Return the public names of a module: those in `__all__` that are no modules, or else all that the module defines."""
    package = (
        importlib.import_module(module) if module != "scconv_jax.runs" else importlib.import_module("scconv_jax.weights.runs")
    )
    names = getattr(package, "__all__", None)
    if names is None:
        names = [name for name, value in vars(package).items() if _is_own(name, value, package)]
    values = {name: getattr(package, name) for name in names}
    return [_name(module, package, name, value) for name, value in values.items() if not isinstance(value, types.ModuleType)]


def public_modules() -> list[str]:
    """Return `scconv_jax` and the modules in its `__all__`."""
    package = importlib.import_module("scconv_jax")
    return ["scconv_jax", *(f"scconv_jax.{name}" for name in package.__all__ if inspect.ismodule(getattr(package, name)))]


def methods(value: type) -> dict[str, Any]:
    """Return the public methods and properties that a class itself defines, without those that Flax or Python calls."""
    hidden = {"setup", "parent", "name", "scope"}
    found = {}
    for name, method in vars(value).items():
        method = method.func if isinstance(method, property) is False and hasattr(method, "func") else method
        if (name == "__call__" or not name.startswith("_")) and name not in hidden and _text(method):
            found[name] = method
    return found


def _is_own(name: str, value: Any, package: types.ModuleType) -> bool:
    return not name.startswith("_") and getattr(value, "__module__", "") == package.__name__ and callable(value)


def _is_code(value: Any) -> bool:
    """Return whether a name is a class or function of ours, and not a constant: `Dtype` is `typing.Any`, itself a class."""
    return (inspect.isroutine(value) or isinstance(value, type)) and value.__module__.startswith("scconv_jax")


def _text(value: Any) -> str:
    return inspect.getdoc(value) or "" if inspect.isroutine(value) or isinstance(value, property) else ""


def _name(module: str, package: types.ModuleType, name: str, value: Any) -> Name:
    if _is_code(value):
        code = inspect.unwrap(value)
        file, line = inspect.getsourcefile(code), inspect.getsourcelines(code)[1]
        return Name(module, name, value, Path(file or ""), line, inspect.getdoc(value) or "")
    file, line, docstring = _constant(Path(package.__file__ or ""), name)
    return Name(module, name, value, file, line, docstring)


def _constant(file: Path, name: str) -> tuple[Path, int, str]:
    """Return the file, the line and the docstring (the string below it) of a constant, which `file` defines or imports."""
    body = ast.parse(file.read_text()).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _constant(Path(importlib.import_module(node.module or "").__file__ or ""), name)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if name in [getattr(target, "id", None) for target in targets]:
            return file, node.lineno, string_of(following)
    raise LookupError(f"{file} defines no {name}")


# --- reStructuredText of one name


def _signature(value: Any) -> str:
    """Return the signature with its annotations as they are written, one that a reader can copy."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "parent") or (parameter.name == "name" and isinstance(value, type)):
            continue
        if parameter.default is not parameter.empty:
            parameter = parameter.replace(default=_Written(_default(parameter.default, value)))
        parameters.append(parameter.replace(annotation=_annotation(parameter.annotation)))
    returned = signature.empty if isinstance(value, type) else _annotation(signature.return_annotation)
    return str(signature.replace(parameters=parameters, return_annotation=returned))


class _Written:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _annotation(annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return annotation
    annotation = getattr(annotation, "__forward_arg__", annotation)
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _Written(re.sub(r"(\[\w+, ['\"]) ", r"\1", text))  # jaxtyping's " c" of one axis


def _default(value: Any, owner: Any) -> str:
    """Return a default as a reader would write it: a long one by the name of its constant in the module of `owner`."""
    if inspect.isroutine(value) or isinstance(value, type):
        return value.__name__
    text = repr(value)
    if len(text) <= 40 and " at 0x" not in text:
        return text
    return next((name for name, known in vars(sys.modules[owner.__module__]).items() if known is value), "...")


def restructured(docstring: str) -> list[str]:
    """Return a Google-style docstring as lines of reStructuredText. Indented blocks of the free text become code."""
    from sphinx.ext.napoleon import Config, GoogleDocstring

    class Docstring(GoogleDocstring):
        def _consume_returns_section(self, preprocess_types: bool = False) -> list[tuple[str, str, list[str]]]:
            """Keep what is returned as it is written: a colon in it ends no type."""
            del preprocess_types
            return [("", "", self._dedent(self._consume_to_next_section()))]

    lines: list[str] = []
    in_section = in_code = False
    # Sphinx would take `.pth` and `~` for names, and their first character for a sign of its own.
    for line in CODE.sub(lambda code: code[0] if NAME.fullmatch(code[1]) else f"`{code[0]}`", docstring).splitlines():
        in_section = (in_section and (not line or line.startswith(" "))) or bool(re.fullmatch(r"[A-Z]\w+:", line))
        indented = line.startswith("    ") and not in_section
        if indented and not in_code and (not lines or not lines[-1]):
            lines += ["::", ""]
        in_code = indented or (in_code and not line)
        lines.append(line)
    config = Config(napoleon_custom_sections=[("Attributes", "params_style")], napoleon_use_rtype=False, napoleon_use_param=True)
    return Docstring(lines, config).lines()


def _kind(value: Any) -> str:
    if not _is_code(value):
        return "data"
    if not isinstance(value, type):
        return "function"
    return "exception" if issubclass(value, Exception) else "class"


def _keys(table: dict[str, Any]) -> str:
    short = {key: repr(value) if len(repr(value)) <= 40 else "..." for key, value in table.items()}
    return f"{{{', '.join(f'{key!r}: {value}' for key, value in short.items())}}}"


def _entry(name: Name, prefix: str) -> Iterator[str]:
    """Yield the entry of a name. `prefix` leads from the page to the root of the site."""
    kind = _kind(name.value)
    yield f".. py:{kind}:: {name.name}{_signature(name.value) if kind in ('class', 'function') else ''}"
    yield f"   :module: {name.module}"
    if kind == "data" and isinstance(name.value, tuple | dict):
        yield f"   :value: {name.value if isinstance(name.value, tuple) else _keys(name.value)}"
    yield ""
    for line in restructured(name.docstring):
        yield f"   {line}"
    yield ""
    path = name.file.relative_to(ROOT)
    yield f"   Code: `{path} <{prefix}sources/{path}.html#L-{name.line}>`__"
    yield ""
    for method, value in methods(name.value).items() if kind == "class" else ():
        is_property = isinstance(value, property)
        yield f"   .. py:{'property' if is_property else 'method'}:: {method}{'' if is_property else _signature(value)}"
        yield f"      :module: {name.module}"
        yield ""
        for line in restructured(_text(value)):
            yield f"      {line}"
        yield ""


# --- the markers


def names(module: str | None, prefix: str) -> Iterator[str]:
    """Yield the entries of a module's public names, under headings for `scconv_jax` itself."""
    assert module
    found = public_names(module)
    if module != "scconv_jax":
        top = {name.name for name in public_names("scconv_jax")}
        again = [name for name in found if name.name in top]
        if again:
            links = ", ".join(f"{{py:obj}}`~scconv_jax.{name.name}`" for name in again)
            yield f"`scconv_jax` exports these names too and has their entries: {links}."
            yield ""
        yield from _block([name for name in found if name not in again], prefix)
        return
    for section in dict.fromkeys([*SECTIONS, *(_folder(name) for name in found)]):
        here = [name for name in found if _folder(name) == section]
        if here:
            yield f"## {SECTIONS.get(section, section.capitalize())}"
            yield ""
            yield from _block(here, prefix)


def _folder(name: Name) -> str:
    return name.file.relative_to(ROOT / "scconv_jax").parts[0].removesuffix(".py")


def _block(found: list[Name], prefix: str) -> Iterator[str]:
    yield "````{eval-rst}"
    for name in sorted(found, key=lambda name: name.name.lower()):
        yield from _entry(name, prefix)
    yield "````"
    yield ""


def overview(_: str | None, prefix: str) -> Iterator[str]:
    """Yield a table of all public names with the first line of each docstring."""
    del prefix
    for module in public_modules():
        yield f"## `{module}`"
        yield ""
        rows = []
        for name in sorted(public_names(module), key=lambda name: name.name.lower()):
            home = "scconv_jax" if name.name in importlib.import_module("scconv_jax").__all__ else module
            rows.append((f"{{py:obj}}`{name.name} <{home}.{name.name}>`", " ".join(name.docstring.split("\n\n")[0].split())))
        yield from table(("name", "what it is"), rows)


MARKERS: dict[str, Callable[[str | None, str], Iterator[str]]] = {
    "names": names,
    "overview": overview,
    "fields": fields,
    "short_names": short_names,
    "commands": commands,
}


def expand(text: str, page: str) -> str:
    """Return the text of a page with its markers replaced. `page` is its name, such as `reference/functional`."""
    prefix = "../" * page.count("/")
    return MARKER.sub(lambda found: "\n".join(MARKERS[found[1]](found[2], prefix)) if found[1] in MARKERS else found[0], text)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""

    def read(_: Any, page: str, source: list[str]) -> None:
        source[0] = expand(source[0], page)

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
