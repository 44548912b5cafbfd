"""Docstrings as plain text: no markup but `code`, sections such as Args, and literal indented lines."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    result: list[str] = []
    title = ""  # the line without indentation before this one
    literal = False
    for line in lines:
        if line and not line.startswith(" "):
            result += [""] * literal
            title, literal = line, False
        elif line and not literal and title not in SECTIONS:
            result += ["", "::", ""]
            literal = True
        result.append(line if literal else _escape(line))
    return result


def _escape(line: str) -> str:
    parts = line.split("`")
    return "`".join(part if i % 2 else re.sub(r"([|*])", r"\\\1", part) for i, part in enumerate(parts))


def _convert(*arguments: Any) -> None:
    lines = arguments[-1]
    is_field = "".join(lines).startswith("Alias for field number")  # of a NamedTuple
    lines[:] = [] if is_field else to_rst(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the hook, before that of napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", _convert, priority=400)
    return {"parallel_read_safe": True}
