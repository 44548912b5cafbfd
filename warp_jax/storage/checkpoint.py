"""Save and restore parameters and training states with Orbax, so that each is complete, on disk and checked.

A folder appears under its name when all its files and a manifest of their checksums are on disk. A bucket cannot
rename: there, files have their final names at once, and the manifest, written last, marks the folder as complete.
Process 0 renames, deletes and checks; the others wait for it where they need the result.
"""

import contextlib
import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from warp_jax import files
from warp_jax.files import buckets
from warp_jax.parallel import hosts
from warp_jax.storage import manifest
from warp_jax.types import Params, StorageError

KEPT_STATES = 2  # if the newest is damaged, training continues from the one before it


def save_params(path: Path, params: Params, *logs: Path) -> None:
    """Save a pytree as a folder, with the checksums of files that belong to it. Raises ValueError if `path` exists."""
    if has_params(path):
        raise ValueError(f"{path} exists, and nothing is overwritten")
    saver = Saver()
    saver.start(path, params, logs)
    saver.wait()


def forget_state(directory: Path) -> None:
    """Delete the training state of a loop, after its result has been saved elsewhere."""
    if hosts.is_first():
        manifest.delete(directory / "state", ignore_errors=True)


def has_params(path: Path) -> bool:
    """Return True if `save_params` has completed for this path."""
    return bool(hosts.number_of_first(lambda: manifest.is_complete(path)))


def restore_params(path: Path, like: Params) -> Params:
    """Restore a pytree with the structure, dtypes and shardings of `like` (arrays or jax.ShapeDtypeStruct).

    Raises StorageError if a file is not what was saved.
    """

    def check() -> None:
        if damage := manifest.damage(path):
            raise StorageError(f"{damage}; delete {path} to make it again")

    hosts.on_first_process(check)
    return _restore(path, abstract(like))


class Saver:
    """Saves pytrees in the background, one after the other."""

    def __init__(self) -> None:
        self._orbax = ocp.StandardCheckpointer()
        self._publishing: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, path: Path, tree: Any, logs: Iterable[Path] = (), then: Callable[[], None] = lambda: None) -> None:
        """Copy the arrays of a tree and return; save them in the background, then call `then` on process 0.

        Waits for the save before. logs: files whose present content belongs to the tree; they are checked with it.
        """
        self.wait()
        is_remote, sizes = files.is_remote(path), {}
        unfinished = path if is_remote else path.with_name(f".{path.name}.saving")
        if is_remote:
            hosts.on_first_process(lambda: manifest.delete(path))  # a killed job may have left a part
        if hosts.is_first():
            files.make_folder(path.parent)
            for log in logs:
                if log.exists():
                    files.sync(log)
                    sizes[os.path.relpath(log, path)] = files.size(log)
        try:
            with _reaching(unfinished):
                self._orbax.save(_absolute(unfinished), tree, force=not is_remote)
        except BaseException:
            _delete_unfinished(unfinished)
            raise
        publish = functools.partial(self._publish, unfinished, path, sizes, then)
        self._publishing = threading.Thread(target=publish)
        self._publishing.start()

    def wait(self) -> None:
        """Wait until what was started is on disk; raise the error of saving, if any."""
        if self._publishing is not None:
            self._publishing.join()
            self._publishing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @functools.partial(jax.profiler.annotate_function, name="saving in the background")
    def _publish(self, unfinished: Path, path: Path, logs: Mapping[str, int], then: Callable[[], None]) -> None:
        try:
            with _reaching(unfinished):
                self._orbax.wait_until_finished()
            if hosts.is_first():
                manifest.seal(unfinished, logs)
                if unfinished != path:
                    unfinished.rename(path)
                    files.sync(path.parent)
                then()
        except BaseException as error:  # raised by wait()
            _delete_unfinished(unfinished)
            self._error = error


def _delete_unfinished(path: Path) -> None:
    """Delete what a failed save has written, under longer names too. In a bucket, the next save does so."""
    if hosts.is_first() and not files.is_remote(path):
        for part in path.parent.glob(f"{path.name}*"):
            shutil.rmtree(part, ignore_errors=True)


class StateStore:
    """The latest training states of one loop, saved in the background: a folder each, named by the steps done."""

    def __init__(self, directory: Path, log: Path):
        self._directory = directory
        self._log = log  # has the rows of all steps
        self._saver = Saver()
        hosts.on_first_process(self._delete_unfinished)

    def restore(self, init: Callable[[], Any]) -> tuple[int, Any]:
        """Return the steps done and the newest whole state; 0 and init() if none is saved.

        init gives the structure, dtypes and shardings too. Damaged states are named, and deleted if an older one is
        left. Raises StorageError if all are damaged.
        """
        if not hosts.number_of_first(lambda: len(manifest.complete_steps(self._directory))):
            return 0, init()
        with futures.ThreadPoolExecutor(max_workers=1) as pool:
            whole = pool.submit(self._newest_whole) if hosts.is_first() else None  # reads while init is compiled
            like = abstract(init())  # its arrays are freed here: device memory may not hold two states
            step = hosts.number_of_first(lambda: whole.result() if whole else 0)
        return step, _restore(self._directory / str(step), like)

    def save(self, step: int, state: Any) -> None:
        """Start saving the state after `step` steps; return before it is on disk."""
        self._saver.start(self._directory / str(step), state, [self._log], self._delete_old)

    def close(self) -> None:
        """Wait until saving has finished."""
        self._saver.wait()

    def _newest_whole(self) -> int:
        damaged: dict[int, str] = {}
        for step in manifest.complete_steps(self._directory):
            damage = manifest.damage(self._directory / str(step))
            if not damage:
                for bad, why in damaged.items():
                    print(f"warning: {why}: continuing from step {step}, not {bad}", file=sys.stderr)
                    manifest.delete(self._directory / str(bad))
                return step
            damaged[step] = damage
        raise StorageError(
            f"{next(iter(damaged.values()))}; delete {self._directory} to train this part from its start"
        )

    def _delete_old(self) -> None:
        for step in manifest.complete_steps(self._directory)[KEPT_STATES:]:
            manifest.delete(self._directory / str(step))

    def _delete_unfinished(self) -> None:
        for path in self._directory.glob("*"):
            if not path.name.isdigit() or not manifest.is_complete(path):
                manifest.delete(path)


def _restore(path: Path, like: Any) -> Any:
    older = path / "default"  # where earlier versions saved a state
    path = older if hosts.exists(older) else path
    with _reaching(path), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(_absolute(path), like)


@contextlib.contextmanager
def _reaching(path: Path) -> Iterator[None]:
    """Turn errors of Orbax and TensorStore into one line if the path is in a bucket: most come from the network."""
    try:
        yield
    except Exception as error:
        if not files.is_remote(path) or isinstance(error, files.BucketError):
            raise
        raise files.BucketError(f"{path}: {buckets.failure(error)}") from error


def _absolute(path: Path) -> Path:
    return path if files.is_remote(path) else path.absolute()


def abstract(tree: Any) -> Any:
    """Turn arrays into jax.ShapeDtypeStruct with the same shapes, dtypes and shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
