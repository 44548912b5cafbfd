"""Atomic and durable writes of files and folders, file locks, and fingerprints of folders.

write_*, read_*, locked, owner, make_folder, size and sync* also take paths in a bucket (see `as_path`).
"""

import contextlib
import errno
import fcntl
import glob
import gzip
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from warp_jax.files import buckets
from warp_jax.files.buckets import BucketError as BucketError  # for others
from warp_jax.files.buckets import as_path as as_path
from warp_jax.files.buckets import is_remote

PIECE = 1 << 16  # bytes per piece of a file in a fingerprint
ANOTHER = "another process"
DAY = 86_400.0  # seconds
_kept: dict[Path, str] = {}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file: a kill or a power cut at any time leaves the old file or the new one; on return it is on disk."""
    if is_remote(path):
        buckets.check_locks()
        path.write_bytes(content)  # one request, which is done wholly or not at all
        return
    make_folder(path.parent)
    unique = secrets.token_hex(4)  # two processes may write at once
    temporary = path.with_name(f".{path.name}.{unique}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # no space, for example
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, if missing; on return they are on disk. Raises FileNotFoundError (see `keep`)."""
    if is_remote(folder):  # a bucket has no folders, only names with slashes
        return
    for kept in _kept:
        if folder.absolute().is_relative_to(kept) and has_vanished(kept):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(kept))
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def delete_litter(folder: Path) -> None:
    """Delete files that killed processes of more than a day ago left half-written, in a folder and those below it."""
    for path in folder.rglob(".*.partial") if not is_remote(folder) else ():
        with contextlib.suppress(OSError):
            if path.is_file() and time.time() - path.stat().st_mtime > DAY:
                path.unlink()


def keep(folder: Path, file: str) -> None:
    """Note that a folder must stay. If it vanishes, the next write into it raises FileNotFoundError.

    file: name of a file in it. Without that file, it is another folder: another thread may have made it meanwhile.
    """
    if not is_remote(folder):
        _kept[folder.absolute()] = file


def has_vanished(folder: Path) -> bool:
    """True if `keep` was called for a folder, and the folder is gone."""
    file = None if is_remote(folder) else _kept.get(folder.absolute())
    return file is not None and not (folder / file).exists()


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, to disk (fsync): they survive a power cut."""
    if is_remote(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Write a folder with everything in it to disk."""
    for path in (*folder.rglob("*"), folder) if not is_remote(folder) else ():
        sync(path)


def size(path: Path) -> int:
    """Size of a file in bytes."""
    status: Any = path.stat()
    return status.length if is_remote(path) else status.st_size


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 (see `write_bytes`)."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON (see `write_bytes`)."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises ValueError that names the file (see `parse_object`)."""
    try:
        return parse_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON: {error}; correct the file, or restore it") from error


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError, without a file name, if it is none or is broken (see `parse_json`)."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}, want a JSON object")
    return value


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError if it is broken or nested too deeply, or if an object has a key twice.

    Libraries differ in which of the two values they take.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return result


def read_bytes(path: Path) -> bytes:
    """Read a file, and decompress it if its name ends in .gz. Raises ValueError if the compressed data is broken."""
    content = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file: {error}; compress it again") from error


def read_text(path: Path) -> str:
    """Read UTF-8 text, with or without byte order mark, compressed or not (see `read_bytes`).

    Raises ValueError with the line of the first byte that is not text.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")
        reason, start = "NUL byte", content.find(b"\0")
    except UnicodeDecodeError as error:
        reason, start = error.reason, error.start
    if start >= 0:
        line = content.count(b"\n", 0, start) + 1
        raise ValueError(f"{path}: not UTF-8 text ({reason} at byte {start}, line {line}); save it as UTF-8")
    return text


def parse_data(text: str, path: Path, want: str, line: int = 0) -> Any:
    """Parse the JSON text of a whole file, or of one line of it (`line` > 0).

    Raises ValueError with the file, the line of the error and what is wanted.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        number = line or getattr(error, "lineno", 0)
        place = f"{path} line {number}" if number else str(path)
        raise ValueError(f"{place}: broken JSON: {getattr(error, 'msg', error)}; want {want}") from error


def as_row(value: Any, place: str) -> dict[str, Any]:
    """Return a parsed JSON value if it is an object of valid text; else raise a ValueError that begins with `place`."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: got {type(value).__name__}, want a JSON object with fields")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: holds {error.object[error.start]!r}, half of a surrogate pair; correct it"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{place}: is nested too deeply; want fewer levels") from error
    return value


def read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the objects of a JSON Lines file, each with its place "PATH line N" for error messages.

    Blank lines are skipped. Raises ValueError if the file is not UTF-8 text or a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # not splitlines: texts may hold U+2028
        if line.strip():
            place = f"{path} line {number}"
            rows.append((place, as_row(parse_data(line, path, "one object a line", number), place)))
    return rows


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a path where the caller creates and fills a folder; at the end, rename it to `folder`.

    The path lies in a hidden folder for this call only. An error deletes it; a killed process leaves it behind, without
    its lock, and the next call for the same `folder` deletes it. Raises FileExistsError if `folder` exists at the end,
    ValueError if it is not local.
    """
    buckets.check_local(folder)
    make_folder(folder.parent)
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*partial"):
        with contextlib.suppress(OSError), locked(path / "lock"):
            shutil.rmtree(path)
    with (
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent) as hidden,
        contextlib.ExitStack() as stack,
    ):
        with contextlib.suppress(OSError):  # a file system without locks
            stack.enter_context(locked(Path(hidden, "lock")))
        staging = Path(hidden, folder.name)
        yield staging
        sync_tree(staging)
        try:
            staging.rename(folder)
            sync(folder.parent)
        except OSError as error:
            if not folder.exists():
                raise
            raise FileExistsError(f"{folder}: another process wrote it first; nothing is overwritten") from error


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Lock the file `path`. The system releases the lock when the process ends, even if it is killed.

    In a bucket, the lock of a killed process is taken over after buckets.STALE seconds, or at once on its machine.
    If another process holds the lock, call on_wait, which may raise, with a name of that process; if it returns, wait
    for the lock. Without on_wait, raise BlockingIOError.
    """
    if is_remote(path):
        with buckets.locked(path, on_wait):
            yield
        return
    make_folder(path.parent)
    with path.open("w") as file:
        if not (_lock_now(file) or _lock_now(file, after=0.05)):  # status.py holds a lock for a moment, to look
            if on_wait is None:
                raise BlockingIOError(f"{path} is held by {ANOTHER}")
            on_wait(ANOTHER)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_now(file: IO[str], after: float = 0.0) -> bool:
    """Lock an open file; False if another process holds the lock. after: seconds to wait first."""
    time.sleep(after)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def owner(path: Path) -> str:
    """Name of the process that holds the lock `path` (see `locked`), "" if none does. Makes no file, keeps no lock."""
    if is_remote(path):
        return buckets.owner(path)
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two callers do not see each other
    except FileNotFoundError:
        return ""
    except BlockingIOError:
        return ANOTHER
    return ""


def fingerprint(folder: Path, names: Iterable[str]) -> str:
    """Hash name, size and three pieces of every file, in the order of the names. Fast for files of any size."""
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        size = path.stat().st_size
        digest.update(f"{name} {size} ".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - PIECE, 0)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:32]
