"""Tables of every setting, made when the site is built: from configs/default.py, and types from warp_jax.settings.

A page that has the line MARK gets the tables in its place.
"""

from __future__ import annotations

import ast
import collections
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic.fields import FieldInfo

from warp_jax.settings import Settings, groups

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MARK = "<!-- table of settings -->"
DEFAULTS = Path(__file__).parents[2] / "configs" / "default.py"
EMPTY = "ConfigDict()"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
NO_BOUNDS = {groups.LARGEST, 10**9}  # of counts and times: no experiment comes near them


class Assignment(NamedTuple):
    """One assignment of configs/default.py."""

    path: str  # such as warp.ema_rate
    default: str  # Python
    meaning: str  # the comments above it and beside it


def assignments(source: str) -> Iterator[Assignment]:
    """Assignments to `config.NAME` in their order, each with its comments."""
    comments, code = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
        elif token.string.strip():
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and (target := ast.unparse(node.targets[0])).startswith("config."):
            first = node.lineno
            while first - 1 in comments and first - 1 not in code:
                first -= 1
            lines = [comments[line] for line in range(first, (node.end_lineno or first) + 1) if line in comments]
            default = "None" if "placeholder" in ast.unparse(node.value) else ast.get_source_segment(source, node.value)
            yield Assignment(target.removeprefix("config."), default or "", " ".join(lines))


def field_of(path: str) -> FieldInfo:
    """The typed setting of a path. Raises KeyError if `Settings` has none."""
    *parents, name = path.split(".")
    model: Any = Settings
    for parent in parents:
        if typing.get_origin(model) is dict:  # rewards: any name
            model = typing.get_args(model)[1]
            continue
        model = model.model_fields[parent].annotation
        if isinstance(model, types.UnionType):  # a group that may be missing
            model = typing.get_args(model)[0]
    return model.model_fields[name]


def type_of(path: str) -> str:
    """Type and range of a setting, in words."""
    field = field_of(path)
    found = [(sign, getattr(part, name, None)) for part in field.metadata for name, sign in BOUNDS.items()]
    bounds = [f"{sign} {bound}" for sign, bound in found if bound is not None and bound not in NO_BOUNDS]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(arguments)
    if arguments and typing.get_origin(annotation) is tuple:
        return f"tuple of {_type_name(arguments[0])}"
    if arguments:
        return f"{_type_name(arguments[0])}" + (" or None" if type(None) in arguments else "")
    return annotation.__name__


def tables(source: str) -> str:
    """Markdown: a heading, the meaning and a table for each group."""
    found = list(assignments(source))
    parents = {each.path: each for each in found if each.default == EMPTY and not _is_leaf(each, found)}
    members = collections.defaultdict(list)
    for each in found:
        if each.path not in parents:
            members[each.path.rpartition(".")[0]].append(each)
    titles = {"": Assignment("", "", "settings of the whole job"), **parents}
    return "\n\n".join(_section(title, members[path]) for path, title in titles.items())


def _is_leaf(group: Assignment, found: list[Assignment]) -> bool:
    return not any(each.path.startswith(f"{group.path}.") for each in found)


def _section(group: Assignment, settings: list[Assignment]) -> str:
    lines = [f"## {'config.' * bool(group.path)}{group.path or 'config'}", "", _cell(group.meaning)]
    if settings:
        lines += ["", "| setting | type | default | meaning |", "|---|---|---|---|"]
    for each in settings:
        name = each.path.rpartition(".")[2]
        default = each.default.replace(EMPTY, "{}")
        lines.append(f"| `{name}` | {_cell(type_of(each.path))} | `{default}` | {_cell(each.meaning)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"docs/(\S+\.md)", r"[\1](\1)", re.sub(r"([|*<\\])", r"\\\1", text))


def _insert(app: Sphinx, name: str, source: list[str]) -> None:
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, tables(DEFAULTS.read_text()))
        app.env.note_dependency(str(DEFAULTS))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hook."""
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True}
