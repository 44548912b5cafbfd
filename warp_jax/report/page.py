"""The page: a template, its style and its script, plotly.js and the data in one HTML file that loads nothing."""

import base64
import functools
import gzip
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plotly import offline

FOLDER = Path(__file__).parent


def render(workdirs: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of one or several workdirs.

    Args:
        workdirs: what `data.gather` returns for each.
        compared: tables of all workdirs, {"title", "note", "rows"}, from `compared.tables`.

    The Content-Security-Policy allows two scripts, by their hashes, and no other address: a completion cannot run.
    """
    template, style, script = (read(f"page.{kind}") for kind in ("html", "css", "js"))
    plotly, packed = _plotly()
    data = json.dumps({"workdirs": workdirs, "compared": compared}, allow_nan=False)
    for character in "<>&":  # a completion may hold </script>
        data = data.replace(character, f"\\u{ord(character):04x}")
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in (script, plotly))
    return string.Template(template).substitute(hashes=hashes, style=style, script=script, plotly=packed, data=data)


def read(name: str) -> str:
    """The text of a file of the page."""
    return (FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> tuple[str, str]:
    """The source of plotly.js, and its gzip file in base64 (2.0 MB; not compressed it has 4.8)."""
    source: str = offline.get_plotlyjs()
    return source, base64.b64encode(gzip.compress(source.encode(), 9, mtime=0)).decode()


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
