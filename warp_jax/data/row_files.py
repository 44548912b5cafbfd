"""Rows of a data file: JSON Lines, a JSON array of objects, CSV with a header, or Parquet; each also compressed (.gz).

Every row comes with its place for error messages: "mine.csv line 7", or "mine.json row 5", where the first row is 0.
"""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warp_jax import files

Rows = list[tuple[str, dict[str, Any]]]  # place and fields of each row


def is_supported(path: Path) -> bool:
    """True if the name ends in a suffix of FORMATS, also followed by .gz; upper or lower case."""
    return _format(path) in FORMATS


def read(path: Path) -> Rows:
    """Read all rows of a file in a supported format. Raises ValueError that names the file and the row or line."""
    rows = FORMATS[_format(path)](path)
    if not rows:
        raise ValueError(f"{path}: has no rows, want at least one")
    return rows


def _format(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_json(path: Path) -> Rows:
    text, want = files.read_text(path), "an array of objects; JSON Lines belong in a .jsonl file"
    value = files.parse_data(text, path, want) if text.strip() else []
    if not isinstance(value, list):
        raise ValueError(f"{path}: holds one {type(value).__name__}, want {want}")
    places = (f"{path} row {number}" for number in range(len(value)))
    return [(place, files.as_row(row, place)) for place, row in zip(places, value, strict=True)]


def _read_csv(path: Path) -> Rows:
    """Read a CSV file with a header; all values are texts."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(files.read_text(path), newline=""), strict=True)
    names: list[str] = []
    rows: Rows = []
    line = 1  # first line of the record that is read next
    try:
        for record in reader:
            place, line = f"{path} line {line}", reader.line_num + 1
            if not names:
                names = _distinct(record, place)
            elif len(record) == len(names):
                rows.append((place, dict(zip(names, record, strict=True))))
            elif record:  # not a blank line
                raise ValueError(f"{place}: has {len(record)} fields, want {len(names)} as in the header")
    except csv.Error as error:
        raise ValueError(f"{path} line {line}: broken CSV: {error}; correct the record that begins here") from error
    return rows


def _read_parquet(path: Path) -> Rows:
    import pyarrow  # noqa: PLC0415  slow to import, and other formats do without
    from pyarrow import parquet  # noqa: PLC0415

    content = files.read_bytes(path)
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        rows = table.to_pylist()
    except Exception as error:  # Arrow raises many types
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: cannot be read as Parquet: {reason}; write it again") from error
    _distinct(table.column_names, str(path))
    return [(f"{path} row {number}", row) for number, row in enumerate(rows)]


def _distinct(names: Sequence[str], place: str) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{place}: has two columns {name!r}, want different names")
    return list(names)


FORMATS = {".jsonl": files.read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
