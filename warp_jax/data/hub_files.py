"""Rows of a dataset on the Hugging Face Hub: the files of one split, read as any data file.

A file belongs to a split if it is named after it, with or without the number of a shard (train.jsonl,
train-00000-of-00002.parquet), or is in a folder of that name (train/0000.parquet).
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from warp_jax.data import row_files
from warp_jax.files import hub

_SHARD = r"-\d+-of-(?P<count>\d+)(?:-[0-9a-f]+)?"


def find(source: str, split: str = "") -> list[Path]:
    """The local files of a source hf://ORG/NAME[@REVISION][/PATH], downloaded if they are missing.

    PATH: a file, or a folder with the files of the split. Raises ValueError if no file fits, or files of several
    folders or formats do.
    """
    path = hub.parse(source).path
    if row_files.is_supported(Path(path)):
        found = [hub.find_data(source, (path,)) / path]
        if not found[0].is_file():
            raise ValueError(f"{source}: no such file in this repository")
        return found
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise ValueError(f"{source}: got the split {split!r}, want its name, such as train, or a file of it: /FILE")
    start = f"{path}/" if path else ""
    root = hub.find_data(source, tuple(f"{start}{folder}{split}[-./]*" for folder in ("", "*/")))
    named = re.compile(
        rf"(?P<folder>{re.escape(start)}(?:.*/)?){re.escape(split)}(?:(?P<inside>/)[^/]+|(?:{_SHARD})?\.[^/]+)"
    )
    files = sorted(file for file in root.rglob("*") if file.is_file() and row_files.is_supported(file))
    matches = {file: named.fullmatch(file.relative_to(root).as_posix()) for file in files}
    chosen = {file: match for file, match in matches.items() if match}
    _check(source, split, chosen, root)
    return list(chosen)


def _check(source: str, split: str, found: Mapping[Path, re.Match[str]], root: Path) -> None:
    """Raise ValueError unless the files are all shards of one split, in one folder and one format."""
    if not found:
        raise ValueError(
            f"{source}: no file named after the split {split!r}, want {split}.jsonl, .json, .csv or .parquet, its "
            "shards, or a folder with them; set data.split, or give a file: hf://ORG/NAME/FILE"
        )
    if len(places := {(match["folder"], match["inside"]) for match in found.values()}) > 1:
        repo = hub.PREFIX + hub.parse(source).repo
        names = {match["folder"].rstrip("/") or file.relative_to(root).as_posix() for file, match in found.items()}
        choices = ", ".join(f"{repo}/{name}" for name in sorted(names))
        raise ValueError(f"{source}: has files of the split {split!r} in {len(places)} places; give one: {choices}")
    if len(suffixes := sorted({"".join(PurePosixPath(file.name).suffixes[-2:]) for file in found})) > 1:
        raise ValueError(
            f"{source}: has files of the split {split!r} in several formats: {', '.join(suffixes)}; give one file"
        )
    if (counts := {int(match["count"] or len(found)) for match in found.values()}) != {len(found)}:
        raise ValueError(
            f"{source}: has {len(found)} files of the split {split!r}, want {min(counts - {len(found)})}, as their "
            "names say; if the cache of the Hub lacks some, run once with network"
        )


def read(source: str, split: str = "") -> row_files.Rows:
    """All rows of the files that `find` returns."""
    return [row for file in find(source, split) for row in row_files.read(file)]
