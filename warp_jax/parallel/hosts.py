"""Several processes of one job: what all agree on, what only the first does, and arrays that no process has whole.

With one process everything here is the plain operation. All processes must make the same calls in the same order.
"""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from warp_jax import cli, files

Result = TypeVar("Result")

_LOSS = re.compile(  # of the texts of JAX's errors
    r"(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |.*(gloo|barrier|heartbeat|coordination service|connection)",
    re.IGNORECASE | re.DOTALL,
)
RESTART_HINT = "start all of them again with the same command, and the job goes on where it stopped"


class PeerError(Exception):
    """Another process of the job cannot go on, and says why."""


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
    """Meet the other processes; without values, those of the environment (Cloud TPU, GKE, Slurm). Before any array.

    ValueError if they cannot be told apart; RuntimeError if they do not come.
    """
    given = (coordinator or None, num_processes or None, process_id if process_id >= 0 else None)
    try:
        jax.distributed.initialize(*given)
    except ValueError as error:
        raise ValueError(
            f"multihost: {error}; on a machine that JAX does not know, give --coordinator=HOST:PORT, --num_processes "
            "and --process_id"
        ) from error


def is_first() -> bool:
    """True in the process that writes files and talks."""
    return jax.process_index() == 0


def broadcast(value: Any) -> Any:
    """The first process's value, a number or a numpy array, in every process."""
    return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value


def exists(path: Path) -> bool:
    """Whether the first process sees the path: what it has just written may not be seen everywhere yet.

    The others do not look: of a path that they did not find, NFS would tell them the same for half a minute.
    """
    return bool(broadcast(np.array(is_first() and path.exists())))


def all_or_none(action: Callable[[], Result]) -> Result:
    """Its result in every process; then all go on, or none: the error where it failed, PeerError in the others.

    Without this, one that fails leaves the others waiting for it. The action itself must not wait for another process.
    """
    try:
        result = action()
    except Exception:
        _of_all(True)
        raise
    failed = _of_all(False)
    if any(failed):
        raise PeerError(f"process {failed.index(True)} of {len(failed)} cannot go on, and says why")
    return result


def make_if_missing(path: Path, make: Callable[[], None]) -> None:
    """Let the first process make a file or folder that is not there; then all go on."""
    if not exists(path):
        on_first_process(make)


def on_first_process(make: Callable[[], None]) -> None:
    """Let the first process do something; then all go on, or none."""
    all_or_none(lambda: make() if is_first() else None)


def fetch(tree: Any) -> Any:
    """Arrays as numpy, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_whole, tree)


def computed_on_first_process(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A host function of the same arguments in every process: the first one calls it, all get its values.

    For functions that may answer differently when they are asked twice, such as a judge behind an API. The result is
    float32 and has an entry for each of the first argument, else ValueError.
    """

    def call(first: Any, *rest: Any) -> np.ndarray:
        values = np.zeros(len(first), np.float32)
        if is_first():
            found = np.asarray(function(first, *rest), np.float32)
            if found.shape != values.shape:
                raise ValueError(f"function: returned shape {found.shape}, want {values.shape}, one number each")
            values = found
        return np.asarray(broadcast(values))

    return call


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """`files.locked` by the first process, for all of them."""
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(files.locked(path, on_wait)))
        yield


def exit_if_peer_lost(error: BaseException) -> None:
    """If the error says that another process is gone, end this one with one line; without goodbyes, which would wait.

    A failed operation between processes is a JaxRuntimeError or a ValueError, as it happens: the text tells.
    """
    if jax.process_count() == 1 or not _LOSS.match(str(error)):
        return
    reason = " ".join(str(error).split())[:200]
    place = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"error: {place} lost the others: {RESTART_HINT} ({reason})", file=sys.stderr)
    _exit_at_once(cli.TRY_AGAIN)


def exit_if_multihost(error: BaseException) -> None:
    """Of several processes, end this one, which cannot go on, so that the others stop too; alone, do nothing.

    At its usual end, JAX would wait here for the others while they wait for this one.
    """
    exit_if_peer_lost(error)
    if jax.process_count() == 1:
        return
    if isinstance(error, SystemExit):  # said already
        _exit_at_once(int(error.code or 0))
    traceback.print_exception(error)
    _exit_at_once(1)


def _exit_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(1)  # for those that stop for the same reason: JAX aborts them when the first is gone
    os._exit(code)


def _of_all(failed: bool) -> list[bool]:
    """What each process says."""
    if jax.process_count() == 1:
        return [failed]
    return multihost_utils.process_allgather(np.array([failed])).ravel().tolist()


def _whole(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(jax.device_get(x))
