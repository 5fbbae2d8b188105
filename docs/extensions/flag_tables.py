"""Tables of the reference: fields of a config, short names of flags, and the arguments of each command."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Headings of the dataclasses whose fields are flags without a group, and a sentence about each.
UNGROUPED = {
    "Config": ("The whole run", "Fields of a config that belong to no group."),
    "Flags": ("The command line", "Flags that are no fields of a config."),
}


def fields(file: str | None, prefix: str) -> Iterator[str]:
    """Yield a table of the fields of each dataclass in a file, with the string below each field as its meaning."""
    del prefix
    groups = [node for node in ast.parse((ROOT / str(file)).read_text()).body if isinstance(node, ast.ClassDef)]
    for group in groups:
        rows = list(_fields(group, "" if group.name in UNGROUPED else f"{group.name.lower()}."))
        if not rows or group.name == "Plan":
            continue
        title, sentence = UNGROUPED.get(group.name, (f"`{group.name.lower()}`", ast.get_docstring(group) or ""))
        yield f"## {title}"
        yield ""
        yield sentence
        yield ""
        yield from table(("flag", "default", "meaning"), rows)


def _fields(group: ast.ClassDef, dot: str) -> Iterator[tuple[str, str, str]]:
    """Yield flag, default and meaning of each field. `dot` is the group with a dot, or empty."""
    for node, following in zip(group.body, [*group.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and string_of(following):
            default = ast.unparse(node.value) if node.value else ""
            if "default_factory" in default:
                continue
            default = "empty" if default in ("", "''", "()") else f"`{default.strip(chr(39))}`"
            flag = f"--{dot}{node.target.id}".replace("_", "-")
            meaning = string_of(following)
            for part in ast.walk(node.annotation):
                if isinstance(part, ast.keyword) and part.arg == "help_behavior_hint":
                    default = str(ast.literal_eval(part.value)).removeprefix("(default: ").removesuffix(")") or "none"
                if isinstance(part, ast.Name) and part.id == "Positional":
                    flag = "DIR"
                if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal":
                    choices = ast.literal_eval(part.slice)
                    meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
            yield f"`{flag}`", default if default.startswith("`") else marked(default), marked(meaning)


def short_names(file: str | None, prefix: str) -> Iterator[str]:
    """Yield a table of the short names of flags, from the table `SHORT_NAMES` in a file."""
    del prefix
    body = ast.parse((ROOT / str(file)).read_text()).body
    [found] = [node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SHORT_NAMES"]
    rows = ast.literal_eval(found).items()
    yield from table(
        ("short name", "flag"), [(", ".join(f"`{name}`" for name in short.split(", ")), f"`{flag}`") for short, flag in rows]
    )


def marked(text: str) -> str:
    """Return a text in which flags and words with an underscore are code."""
    word = r"(--[a-z][\w-]*(?:\.[a-z][\w-]*)*|[~\w./-]*\w_\w(?:[\w./=-]*\w)?)"
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(word, r"`\1`", part).replace("*", r"\*") for part in parts)


def table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield a table in Markdown."""
    heading = tuple(heading)
    for cells in (heading, ("---",) * len(heading), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"
    yield ""


def commands(_: str | None, prefix: str) -> Iterator[str]:
    """Yield each command of `python -m scconv_jax` with its arguments."""
    import argparse

    from scconv_jax.cli import _parser

    del prefix
    subparsers = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in subparsers[0].choices.items():
        yield f"## `{name}`"
        yield ""
        yield str(parser.description)
        yield ""
        rows = []
        for action in parser._actions:
            if action.help and "-h" not in action.option_strings:
                value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
                value = " ".join(value) if isinstance(value, tuple) else value
                written = " ".join([", ".join(action.option_strings), value]).strip()
                rows.append((f"`{written}`", marked(action.help % vars(action))))
        yield from table(("argument", "meaning"), rows)


def string_of(node: ast.AST | None) -> str:
    """Return the text of a statement that is a string, or else an empty one."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return ""
