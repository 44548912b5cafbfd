"""Paths and locks of workdirs in buckets of Google Cloud Storage.

A bucket writes an object wholly or not at all and, on request, only if it has not changed since it was read. It can
neither rename nor lock objects: a lock is an object that its owner renews, and that others may replace if it is not.
"""

import contextlib
import errno
import getpass
import importlib.util
import logging
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, cast

from warp_jax.exit_codes import STORAGE

HEARTBEAT = 20.0  # seconds between two renewals of a lock
STALE = 90.0  # seconds without a renewal after which the next process takes a lock over
POLL = 1.0  # seconds between two looks at a lock

_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/[\w.=+,@ -]+)+/?")
_OTHER_SCHEME = re.compile(r"[a-zA-Z][\w+.-]*:/|(gs|gcs|s3|az|hf|file|https?):", re.IGNORECASE)


class BucketError(Exception):
    """A request failed, or another process took over a lock. The message is one line, which says what to do."""

    exit_code = STORAGE


_held: set["_Lock"] = set()  # by this process


def as_path(text: str) -> Path:
    """The path of a workdir: a local folder, or gs://BUCKET/FOLDER.

    A path in a bucket is no pathlib.Path, but has the methods of one that are used for workdirs. Raises ValueError if
    the text is neither or the bucket refuses to be read, BucketError if it does not answer.
    """
    if not _OTHER_SCHEME.match(text):
        return Path(text)
    if not _BUCKET.fullmatch(text) or {".", ".."} & {*text.split("/")}:
        raise ValueError(f"workdir: got {text!r}, want a local folder or gs://BUCKET/FOLDER")
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(f"workdir: {text} needs the package gcsfs: pip install 'warp_jax[gcs]'")
    os.environ["EPATH_USE_TF"] = "false"  # else epath needs TensorFlow's own access to buckets, if it is installed
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else each call asks for the kind of bucket
    path = _remote_path(text)
    try:
        path.exists()
    except BucketError:  # a lost network is no bad input
        raise
    except Exception as error:
        raise ValueError(f"workdir: cannot read {text}: {error}") from error
    return cast(Path, path)


def _remote_path(text: str) -> Any:
    import fsspec  # noqa: PLC0415  these imports take .3 s, which local workdirs save
    import gcsfs  # noqa: PLC0415
    from etils import epath  # noqa: PLC0415

    class Client(gcsfs.GCSFileSystem):
        async def _call(self, *args: Any, **options: Any) -> Any:
            try:
                return await super()._call(*args, **options)
            except Exception as error:  # of several libraries; is_dir() reads some as "there is no folder"
                if isinstance(error, FileNotFoundError | FileExistsError) or str(error).startswith("Forbidden"):
                    raise
                raise BucketError(failure(error)) from error

    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Client, clobber=True)
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False  # other processes write too
    for name in ("fsspec", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log each file, and errors that they also raise
    return epath.Path(text)


def check_local(path: PurePath) -> None:
    """Raise ValueError if a path is an address in a bucket: only workdirs may be there."""
    if is_remote(path) or _OTHER_SCHEME.match(str(path)):
        raise ValueError(f"got {path}, want a local folder: only workdirs can be in a bucket")


def is_remote(path: PurePath) -> bool:
    """True for a path in a bucket."""
    return not isinstance(path, Path)


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Metadata of each object in a folder, by its path relative to the folder."""
    import fsspec  # noqa: PLC0415

    found = fsspec.filesystem("gs").find(str(folder), detail=True)
    start = len(str(folder).removeprefix("gs://")) + 1
    return {name[start:]: about for name, about in found.items()}


def delete(paths: Sequence[Path]) -> None:
    """Delete objects; some may be missing."""
    import fsspec  # noqa: PLC0415

    check_locks()
    if paths:
        fsspec.filesystem("gs").rm([str(path) for path in paths])


def failure(error: Exception) -> str:
    """Message about a failed request."""
    text = str(error) or type(error).__name__
    return f"a request to the bucket failed ({text[:300]}); check the network and your credentials"


def check_locks() -> None:
    """Raise BucketError if another process may hold a lock of this one now. Called before each write to a bucket."""
    for lock in [*_held]:
        lock.check()


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[str], None] | None) -> Iterator[None]:
    """Hold the lock object `path` (see `files.locked`), and renew it in a thread."""
    lock = _Lock(path)
    lock.take(on_wait)
    _held.add(lock)
    threading.Thread(target=lock.keep, daemon=True).start()
    try:
        yield
    finally:
        _held.remove(lock)
        lock.release()


def owner(path: Path) -> str:
    """Owner of the lock object `path`, and how long ago it was renewed; "" if nobody holds it."""
    found = _Lock(path).read()
    if found is None or _lives(found.metadata) is False:
        return ""
    age = time.time() - found.updated.timestamp()
    return f"{found.metadata['owner']}, renewed {max(age, 0):.0f} s ago" if age < STALE else ""


class _Lock:
    """A lock: an object that its owner renews, and that others may replace when it has not been renewed for long."""

    def __init__(self, path: Path):
        from google.cloud import storage  # noqa: PLC0415

        bucket, _, self._name = str(path).removeprefix("gs://").partition("/")
        self._path = path
        self._bucket = storage.Client(project="any").bucket(bucket)  # only making a bucket needs a project
        self._about = _about_this_process() | {"token": secrets.token_hex(8)}
        self._generation = 0  # changes with each write; 0 = no object
        self._renewed = 0.0
        self._lost = False
        self._released = threading.Event()
        self._one_call = threading.Lock()

    def read(self) -> Any:
        """The object with its generation and metadata; None if it is missing."""
        try:
            return self._bucket.get_blob(self._name)
        except Exception as error:
            raise BucketError(f"{self._path}: {failure(error)}") from error

    def take(self, on_wait: Callable[[str], None] | None) -> None:
        """Write the lock when it is free or its owner is dead; call on_wait once if the owner lives."""
        replaced, seen, since, told = 0, 0, 0.0, False
        while not self._write(replaced):
            replaced, found = 0, self.read()
            if found is None:
                continue
            lives, renewed = _lives(found.metadata), seen not in (0, found.generation)
            if (lives or renewed) and not told:
                if on_wait is None:
                    raise BlockingIOError(f"{self._path} is held by {found.metadata['owner']}")
                on_wait(found.metadata["owner"])
                told = True
            if lives is None and not seen:
                holder = found.metadata["owner"]
                print(f"waiting up to {STALE:.0f} s: is {holder} running, which holds {self._path}?", file=sys.stderr)
            if found.generation != seen:
                seen, since = found.generation, time.monotonic()
            if lives is False or time.monotonic() - since > STALE:
                replaced = found.generation
            else:
                time.sleep(POLL)

    def keep(self) -> None:
        """Renew the lock until it is released."""
        while not self._released.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # the network may come back; until then, check() stops all writes
                self._renew()

    def check(self) -> None:
        """Renew the lock if half of STALE is over; raise BucketError if another process has taken it."""
        if not self._lost and time.monotonic() - self._renewed > STALE / 2:
            self._renew()
        if self._lost:
            raise BucketError(
                f"{self._path}: another process has taken over this lock, which was not renewed for {STALE:.0f} s; "
                "this process stops, and the other goes on"
            )

    def release(self) -> None:
        """Delete the lock, unless another process holds it."""
        self._released.set()
        with self._one_call, contextlib.suppress(Exception):  # else it ends when it is stale
            if not self._lost:
                self._bucket.blob(self._name).delete(if_generation_match=self._generation)

    def _renew(self) -> None:
        with self._one_call:
            if not self._lost and not self._released.is_set():
                self._lost = not self._write(self._generation)

    def _write(self, generation: int) -> bool:
        """Replace this generation of the lock; False if the lock has another one by now."""
        from google.api_core.exceptions import NotFound, PreconditionFailed  # noqa: PLC0415

        blob, started = self._bucket.blob(self._name), time.monotonic()
        blob.metadata = self._about
        try:
            blob.upload_from_string(b"", if_generation_match=generation)
        except PreconditionFailed:
            blob = self.read()  # a repeated request meets its own first try
            if blob is None or blob.metadata["token"] != self._about["token"]:
                return False
        except NotFound as error:
            raise OSError(errno.ENOENT, "there is no such bucket") from error
        except Exception as error:
            raise BucketError(f"{self._path}: {failure(error)}") from error
        self._generation, self._renewed = blob.generation, started
        return True


def _about_this_process() -> dict[str, str]:
    host, pid = socket.gethostname(), os.getpid()
    job = os.environ.get("SLURM_JOB_ID", "")
    name = f"process {pid} of {_user()} on {host}" + (f" (job {job})" if job else "")
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"owner": name, "since": since, "machine": _machine(), "process": _process(pid), "pid": str(pid)}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, its number may have no name; OSError since Python 3.13
        return f"user {os.getuid()}"


def _lives(about: Mapping[str, str]) -> bool | None:
    """True if the owner of a lock lives, False if it is dead; None if it ran on another machine."""
    if not about["process"] or about["machine"] != _machine():
        return None
    return _process(int(about["pid"])) == about["process"]


def _machine() -> str:
    """Name of this machine since its last boot, and of this container; "" outside Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process(pid: int) -> str:
    """Name of a process that no later process with its number gets; "" if there is no process, or outside Linux."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else f"{pid} {fields[18]}"  # Z: dead, but its parent has not waited for it
