"""Multi-host helpers: broadcast, run on process 0, gather.

All processes of a job must make the same calls in the same order. With one process, each helper is the plain operation.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from warp_jax import cli, files

Result = TypeVar("Result")

_PEER_LOST = re.compile(  # texts of JAX's errors after another process is gone
    r"(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |.*(gloo|barrier|heartbeat|coordination service|connection)",
    re.IGNORECASE | re.DOTALL,
)
RESTART_HINT = "start all processes again with the same command to resume the job"


class PeerError(Exception):
    """Another process of the job failed; the failed process prints the reason. All end with its exit code."""

    def __init__(self, message: str, exit_code: int = cli.TRY_AGAIN):
        super().__init__(message)
        self.exit_code = exit_code


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
    """Connect this process to the others of the job. Call it before any array is made.

    coordinator "", num_processes 0 and process_id -1: detect the value (Cloud TPU, GKE, Slurm). Raises ValueError if
    that fails, RuntimeError if the other processes do not connect in time.
    """
    given = (coordinator or None, num_processes or None, process_id if process_id >= 0 else None)
    try:
        jax.distributed.initialize(*given)
    except ValueError as error:
        raise ValueError(
            f"multihost: {error}; JAX cannot detect the job on this machine: set --coordinator=HOST:PORT, "
            "--num_processes and --process_id"
        ) from error


def is_first() -> bool:
    """True in process 0, which writes the files and prints."""
    return jax.process_index() == 0


def exists(path: Path) -> bool:
    """True in every process if the path exists for process 0.

    Only process 0 checks: on NFS, other hosts see a new file late, and cache each failed check.
    """
    return bool(number_of_first(path.exists))


def number_of_first(find: Callable[[], int]) -> int:
    """The number that a function returns in process 0, in every process. If it fails, all stop (see `all_or_none`)."""
    if jax.process_count() == 1:
        return int(find())
    found = all_or_none(lambda: int(find()) if is_first() else 0)
    return int(multihost_utils.broadcast_one_to_all(np.array(found)))


def text_of_first(find: Callable[[], str]) -> str:
    """The text that a function returns in process 0, in every process. If it fails, all stop (see `all_or_none`)."""
    text = all_or_none(lambda: find() if is_first() else "").encode()
    size = number_of_first(lambda: len(text))
    content = np.frombuffer(text, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).astype(np.uint8).tobytes().decode()


def all_or_none(action: Callable[[], Result]) -> Result:
    """Run an action in every process and return its result. If it fails in any process, all stop.

    Without this, the others would wait for the failed one. The action itself must not wait for another process.

    Raises:
        PeerError: the action failed in another process, which raises the action's own error.
    """
    try:
        result = action()
    except Exception as error:
        _gather(cli.explain(error)[0])
        raise
    codes = _gather(0)
    if any(codes):
        code = next(filter(None, codes))
        raise PeerError(f"process {codes.index(code)} of {len(codes)} failed; its output has the reason", code)
    return result


def make_if_missing(path: Path, make: Callable[[], None]) -> None:
    """Make a file or folder on process 0 if it does not exist; the others wait."""
    if not exists(path):
        on_first_process(make)


def on_first_process(make: Callable[[], None]) -> None:
    """Run a function on process 0; the others wait. If it fails, all stop (see `all_or_none`)."""
    all_or_none(lambda: make() if is_first() else None)


def fetch(tree: Any) -> Any:
    """Gather every array of a tree as a complete numpy array in every process."""

    def gather(x: Any) -> Any:
        is_here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if is_here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(gather, tree))


def computed_on_first_process(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Wrap a function so that only process 0 calls it and all processes get its result.

    For functions that may return different values in each process, such as a judge behind an API. It must return
    float32 [N], with N the length of the first argument. If it fails, its error is raised in process 0, and PeerError
    in the others.
    """

    def call(first: Any, *rest: Any) -> np.ndarray:
        values, failure = np.zeros(len(first), np.float32), None
        if is_first():
            try:
                values = np.asarray(function(first, *rest), np.float32)
            except Exception as error:
                failure = error
        values, failed = multihost_utils.broadcast_one_to_all((values, np.array(failure is not None)))
        if failure is not None:
            raise failure
        if failed:
            raise PeerError(f"process 0 of {jax.process_count()} failed; its output has the reason")
        return np.asarray(values)

    return call


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold a file lock on process 0 for all processes (see `files.locked`)."""
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(files.locked(path, on_wait)))
        yield


def exit_if_multihost(error: BaseException) -> None:
    """End a multi-host job after an error (see `end`). With one process, do nothing."""
    if not _is_alone():
        end(error)


def end(error: BaseException, *, bad_input: bool = False) -> NoReturn:
    """Print one line about an error, unless it is a SystemExit, and end this process with its exit code.

    It waits neither for its threads nor for other processes: at a normal exit JAX would wait for them, while they wait
    for this one. bad_input: True if a check of the input raised the error.
    """
    alone = _is_alone()
    if isinstance(error, SystemExit):  # its message is printed already
        code = int(error.code or 0)
    elif not alone and _is_peer_lost(error):
        reason = " ".join(str(error).split())[:200]
        process = f"process {jax.process_index()} of {jax.process_count()}"
        cli.print_error(f"{process} lost the others: {RESTART_HINT} ({reason})")
        code = cli.TRY_AGAIN
    else:
        code = cli.report(error, bad_input=bad_input)
    if not alone and is_first():
        time.sleep(1)  # let the others exit for the same reason first: JAX aborts them when process 0 is gone
    cli.end(code)


def _is_peer_lost(error: BaseException) -> bool:
    """Judge by the text, as JAX raises errors of several types; a BucketError may hold one of them."""
    is_own = hasattr(error, "exit_code") and not isinstance(error, files.BucketError)
    return not is_own and bool(_PEER_LOST.match(str(error)))


def _is_alone() -> bool:
    try:
        return jax.process_count() == 1
    except RuntimeError:  # JAX finds no device
        return True


def _gather(number: int) -> list[int]:
    """The number of each process, in order."""
    return multihost_utils.process_allgather(np.array([number])).ravel().tolist()
