"""Manifests: size and checksum of every file in a folder, written last and checked before the folder is read."""

import contextlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from warp_jax import files

NAME = "manifest.json"


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
