"""Size and checksum of files: of every file in a folder (its manifest, written last), or of single files.

They are compared before a file is read.
"""

import contextlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from warp_jax import files
from warp_jax.types import StorageError

NAME = "manifest.json"
CHECKSUMS = "checksums.json"  # of single files, in the folder that their names are relative to


def seal(folder: Path, logs: Mapping[str, int] | None = None) -> None:
    """Write the manifest of a complete folder, and bring the folder to disk.

    logs: files outside the folder that grow, as paths relative to it; their first so many bytes belong to the folder.
    """
    described = {name: describe(path) for name, path in _contents(folder).items()}
    beginnings = {name: describe(folder / name, size) for name, size in (logs or {}).items()}
    files.write_json(folder / NAME, {"files": described, "logs": beginnings})
    files.sync_tree(folder)


def damage(folder: Path, *, with_logs: bool = True) -> str:
    """The first difference between a folder and its manifest, in words; "" = none. Older folders have no manifest.

    with_logs: compare the logs outside the folder too; False for a folder that may have been copied without them.
    """
    path = folder / NAME
    if not path.exists():
        return ""
    try:
        manifest = files.read_json(path)
        wanted, logs = manifest["files"], manifest["logs"] if with_logs else {}
        found = _contents(folder)
        if odd := sorted(wanted.keys() ^ found.keys()):
            return f"{folder / odd[0]} is {'missing' if odd[0] in wanted else 'not in its manifest'}"
        for name, was in [*wanted.items(), *logs.items()]:
            if describe(folder / name, was["size"] if name in logs else None) != was:
                return f"{(folder / name).resolve()} is not what was written"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{path} is not what was written"
    return ""


def note(folder: Path, name: str) -> None:
    """Note the checksum of a complete file, for `changed`. Raises StorageError if another one is noted."""
    noted = _noted(folder)
    found = describe(folder / name)
    if noted.get(name, found) != found:
        raise StorageError(f"{folder / name} was made again, and is not what it was; restore it, or start a new folder")
    files.write_json(folder / CHECKSUMS, {**noted, name: found})


def changed(folder: Path) -> str:
    """The first noted file that is there, but is not what was noted, in words; "" = none."""
    try:
        for name, was in _noted(folder).items():
            if (folder / name).exists() and describe(folder / name) != was:
                return f"{folder / name} is not what was written"
    except (ValueError, OSError):  # a broken file, or impossible names in it
        return f"{folder / CHECKSUMS} is not what was written"
    return ""


def _noted(folder: Path) -> dict[str, Any]:
    path = folder / CHECKSUMS
    return files.read_json(path) if path.exists() else {}


def describe(path: Path, size: int | None = None) -> dict[str, Any]:
    """Size in bytes and XXH3-128 checksum of a file, or of its first `size` bytes, or of what it has of them."""
    if not path.is_file() or not path.stat().st_size:  # an empty file cannot be mapped
        return {"size": 0, "xxh3": xxhash.xxh3_128_hexdigest(b"")}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        beginning = stack.enter_context(stack.enter_context(memoryview(content))[:size])
        return {"size": len(beginning), "xxh3": xxhash.xxh3_128_hexdigest(beginning)}


def _contents(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(NAME, None)
    return paths
