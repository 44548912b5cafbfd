"""Tables of the flags of every program, made when the site is built from the programs themselves.

A page that has the line MARK gets the tables in its place.
"""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags  # noqa: F401 (app defines flags that are not a program's own)

from warp_jax.commands import COMMANDS

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MARK = "<!-- tables of flags -->"
ROOT = Path(__file__).parents[2]


def programs() -> dict[Path, str]:
    """Files that define flags, and the command that starts each: those of warp-jax, then the other scripts."""
    found = {ROOT / f"{command.module.replace('.', '/')}.py": f"warp-jax {name}" for name, command in COMMANDS.items()}
    found |= {path: f"python {path.relative_to(ROOT)}" for path in sorted(ROOT.glob("scripts/**/*.py"))}
    return {path: command for path, command in found.items() if "flags.DEFINE_" in path.read_text()}


def flags_of(program: Path) -> Iterator[flags.Flag]:
    """The flags that a program defines."""
    before = set(flags.FLAGS)
    sys.path.insert(0, str(program.parent))
    try:
        runpy.run_path(str(program))
        for name in sorted(set(flags.FLAGS) - before):
            yield flags.FLAGS[name]
    finally:
        sys.path.remove(str(program.parent))
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def section(program: Path, command: str) -> str:
    """Markdown: command, first line of the docstring, and a table of flags."""
    summary = (ast.get_docstring(ast.parse(program.read_text())) or "").split("\n\n")[0].split(": python")[0]
    lines = [f"## {command}", "", _cell(summary), "", "| flag | default | meaning |", "|---|---|---|"]
    lines += [f"| `--{flag.name}` | {_default(flag)} | {_cell(flag.help or '')} |" for flag in flags_of(program)]
    return "\n".join(lines)


def _default(flag: flags.Flag) -> str:
    text = flag.default_as_str.strip("'").replace(str(Path.home()), "~") if flag.default not in (None, "", []) else ""
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return re.sub(r"([|*<\\])", r"\\\1", " ".join(text.split()))


def _insert(site: Sphinx, name: str, source: list[str]) -> None:
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, "\n\n".join(section(*item) for item in programs().items()))
        for path in programs():
            site.env.note_dependency(str(path))


def setup(site: Sphinx) -> dict[str, bool]:
    """Register the hook."""
    site.connect("source-read", _insert)
    return {"parallel_read_safe": True}
