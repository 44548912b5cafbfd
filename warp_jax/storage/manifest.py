"""Sizes and checksums of files: of every file in a folder (its manifest, written last), or of single files.

Each file is compared with them before it is read. In a bucket, the server computes the checksums (MD5), so nothing is
downloaded to write or check a manifest; a folder without a manifest is unfinished.
"""

import base64
import functools
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from warp_jax import files
from warp_jax.files import buckets

NAME = "manifest.json"
CHECKSUMS = "checksums.json"  # of single files, in the folder that their names are relative to
HASHES: dict[str, Callable[[], Any]] = {
    "xxh3": xxhash.xxh3_128,
    "md5": functools.partial(hashlib.md5, usedforsecurity=False),
}
PIECE = 1 << 18  # bytes that are read at a time
LOG = re.compile(r"(\.\./){1,2}[^/]+")  # beside the folder, or beside the folder that holds it


def is_complete(folder: Path) -> bool:
    """True if a folder has been saved wholly. A local one appears under its name only then."""
    return (folder / NAME if files.is_remote(folder) else folder).exists()


def complete_steps(directory: Path) -> list[int]:
    """Names of the complete folders in a directory that are numbers (steps), the newest first."""
    folders = [path for path in directory.glob("*") if path.name.isdigit() and is_complete(path)]
    return sorted((int(path.name) for path in folders), reverse=True)


def delete(folder: Path, *, ignore_errors: bool = False) -> None:
    """Delete a folder of weights, or a folder of such folders. In a bucket, manifests go first: no rest is complete."""
    if not files.is_remote(folder):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    names = [folder / name for name in buckets.contents(folder)]
    buckets.delete([path for path in names if path.name == NAME])
    buckets.delete(names)


def seal(folder: Path, logs: Mapping[str, int] | None = None) -> None:
    """Write the manifest of a complete folder, and bring the folder to disk.

    logs: files outside the folder that grow, as paths relative to it; their first so many bytes belong to the folder.
    """
    described = {name: about or describe(folder / name) for name, about in _contents(folder).items()}
    beginnings = {name: describe(_file(folder, name), size) for name, size in (logs or {}).items()}
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
        if not all(map(LOG.fullmatch, logs)):
            raise ValueError
        found = _contents(folder)
        if odd := sorted(wanted.keys() ^ found.keys()):
            return f"{folder / odd[0]} is {'missing' if odd[0] in wanted else 'not in its manifest'}"
        for name, was in [*wanted.items(), *logs.items()]:
            kind = next(kind for kind in HASHES if kind in was)
            now = found[name] if name in wanted else {}
            if kind not in now:  # a local file, or one that was copied from a disk to a bucket
                now = describe(_file(folder, name), was["size"] if name in logs else None, kind)
            if now != was:
                return f"{_file(folder, name)} is not what was written"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, StopIteration):
        return f"{path} is not what was written"
    return ""


def note(folder: Path, name: str, *, again: bool = False) -> None:
    """Note the checksum of a complete file, for `changed`.

    Raises StorageError if another one is noted, unless `again` says that the file may have changed.
    """
    from warp_jax.types import StorageError  # noqa: PLC0415  it imports JAX, which scripts/merge.py does without

    noted = _noted(folder)
    found = describe(folder / name)
    if not again and noted.get(name, found) != found:
        raise StorageError(
            f"{folder / name} was made again, and is not what it was; restore it, or choose another --workdir"
        )
    noted[name] = found
    files.write_json(folder / CHECKSUMS, {"files": dict(sorted(noted.items())), "xxh3": _own_checksum(noted)})


def is_noted(folder: Path, name: str) -> bool:
    """True if the checksum of a file is noted."""
    return name in _noted(folder)


def changed(folder: Path) -> str:
    """Say which noted file exists but has changed, the first one only; "" = none."""
    try:
        for name, was in _noted(folder).items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError
            if (folder / name).exists() and describe(folder / name) != was:
                return f"{folder / name} is not what was written"
    except (ValueError, OSError):  # a broken file, or impossible names in it
        return f"{folder / CHECKSUMS} is not what was written"
    return ""


def _noted(folder: Path) -> dict[str, Any]:
    """Noted size and checksum of each file. Raises ValueError if it is not what was written."""
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    content = files.read_json(path)
    if content.keys() != {"files", "xxh3"} or content["xxh3"] != _own_checksum(content["files"]):
        raise ValueError(f"{path} is not what was written; delete it to make it again")
    noted: dict[str, Any] = content["files"]
    return noted


def _own_checksum(noted: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(noted, sort_keys=True).encode())


def describe(path: Path, size: int | None = None, kind: str = "xxh3") -> dict[str, Any]:
    """Size in bytes and checksum of a file, or of its first `size` bytes, or of what it has of them."""
    hasher, length = HASHES[kind](), 0
    for piece in _pieces(path, size):
        hasher.update(piece)
        length += len(piece)
    text = base64.b64encode(hasher.digest()).decode() if kind == "md5" else hasher.hexdigest()
    return {"size": length, kind: text}


def _pieces(path: Path, size: int | None) -> Iterator[memoryview]:
    """The first `size` bytes of a file, or all; none if it is missing. A piece is valid until the next one is asked.

    They are read, not mapped: so a bad disk is an error.
    """
    if not path.is_file():
        return
    buffer = memoryview(bytearray(PIECE))
    with io.BytesIO(path.read_bytes()) if files.is_remote(path) else path.open("rb", buffering=0) as file:
        left = files.size(path) if size is None else size
        while count := file.readinto(buffer[:left]):
            left -= count
            yield buffer[:count]


def _contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, as the bucket reports them; {} for each file on a disk."""
    if files.is_remote(folder):
        found = {
            name: {"size": about["size"], "md5": about["md5Hash"]} if "md5Hash" in about else {}
            for name, about in buckets.contents(folder).items()
        }
    else:
        found = {path.relative_to(folder).as_posix(): {} for path in sorted(folder.rglob("*")) if path.is_file()}
    found.pop(NAME, None)
    return found


def _file(folder: Path, name: str) -> Path:
    """Path of a file relative to a folder, without "..", which a bucket does not know."""
    if not files.is_remote(folder):
        return (folder / name).resolve()
    for part in PurePosixPath(name).parts:
        folder = folder.parent if part == ".." else folder / part
    return folder
