"""Compiled programs kept between processes: the store behind JAX's compilation cache.

JAX's own store (jax 0.10) writes files in place, without checksums: a kill or a flipped bit leaves a damaged entry that
is loaded or never replaced. With a limit of size, it also lets only one process read at a time. Here an entry appears
whole under its name, is checked when it is read, and is made again if it is damaged. Whatever fails, the program is
compiled.
"""

import contextlib
import hashlib
import os
import platform
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache as internals
from jax.experimental.compilation_cache import compilation_cache

from warp_jax import files
from warp_jax.files import buckets

NAME = ".xla_cache"
MAX_BYTES = 2**30
PROGRAM, PARTIAL = ".program", ".program.partial"  # ends of names; other files in the folder are left alone
AUTO, OFF = "auto", "off"


def choose(choice: str, workdir: Path) -> Path | None:
    """The folder of compiled programs; None: keep none. Writes nothing.

    choice: AUTO, OFF or a folder. AUTO is shared by the workdirs of one parent; for a bucket, which answers too slowly,
    it is in WARP_JAX_CACHE (default ~/.cache/warp_jax). Raises ValueError if the choice is neither.
    """
    if choice == OFF:
        return None
    if choice == AUTO:
        if not files.is_remote(workdir):
            return workdir.absolute().parent / NAME
        return Path(os.path.expanduser(os.environ.get("WARP_JAX_CACHE") or "~/.cache/warp_jax"), "xla")
    try:
        buckets.check_local(Path(choice))
    except ValueError as error:
        raise ValueError(f"compilation_cache: {error}") from error
    if not choice or (os.path.exists(choice) and not os.path.isdir(choice)):
        raise ValueError(f"compilation_cache: got {choice!r}, want {AUTO}, {OFF} or a folder")
    return Path(choice).absolute()


def enable(folder: Path) -> None:
    """Keep all programs that are compiled from now on in a folder, which is made, and take them from there.

    Does nothing if JAX has a compilation cache already (JAX_COMPILATION_CACHE_DIR), or if others may write into the
    folder: a program from there would do what they want.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    config: Any = jax.config
    jax_cache: Any = internals  # no public function takes another store
    if (
        jax.process_count() > 1 and jax.default_backend() == "gpu"
    ):  # a process that finds all would not tune with the others
        return
    if config.jax_compilation_cache_dir or not _is_private(folder) or not hasattr(jax_cache, "get_file_cache"):
        return
    jax_cache.get_file_cache = lambda path: (Store(Path(path)), path)
    compilation_cache.reset_cache()
    for name, value in {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "",  # files that XLA writes itself
    }.items():
        config.update(name, value)


def _is_private(folder: Path) -> bool:
    """True for a folder that belongs to this user, and that no other user may write into."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


class Store:
    """Entries by key, a file each: the SHA-256 of the value, then the value.

    If the folder is too large, the least recently used entries are deleted.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES):
        self._path = folder  # JAX asks for it
        self._max_bytes = max_bytes

    def get(self, key: str) -> bytes | None:
        """The value of a key; None if it is missing or damaged."""
        path = self._file(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        digest, value = content[:32], content[32:]
        return value if hashlib.sha256(value).digest() == digest else None

    def put(self, key: str, value: bytes) -> None:
        """Set the value of a key, if the folder can be written."""
        with contextlib.suppress(OSError):
            descriptor, temporary = tempfile.mkstemp(PARTIAL, dir=self._path)
            try:
                with open(descriptor, "wb") as file:
                    file.write(hashlib.sha256(value).digest() + value)
                os.replace(temporary, self._file(key))
            except OSError:
                os.unlink(temporary)
                raise
            self._trim()

    def _file(self, key: str) -> Path:
        return self._path / f"{key}-{machine()}{PROGRAM}"

    def _trim(self) -> None:
        """Delete the entries that were not used for longest, and what killed processes left half-written."""
        entries = (entry for entry in os.scandir(self._path) if entry.name.endswith((PROGRAM, PARTIAL)))
        found = [(entry.stat(), entry.path) for entry in entries]
        total = sum(status.st_size for status, _ in found)
        for status, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
            if total <= self._max_bytes:
                return
            with contextlib.suppress(FileNotFoundError):  # another process deletes too
                os.unlink(path)
            total -= status.st_size


def machine() -> str:
    """Name of the processor. XLA (jaxlib 0.10) would load a program compiled for another CPU, and may crash."""
    about = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = re.findall(r"^(?:model name|flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        about += " ".join(sorted(set(lines)))
    return hashlib.sha256(about.encode()).hexdigest()[:16]
