"""Stop a job when it is asked to, by SIGTERM, SIGUSR1 or SIGINT: all processes save and end after the same step.

The first signal is only noted. A second one, later than REPEAT_SECONDS, ends the process at once.
"""

import os
import signal
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

from warp_jax import cli

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 2.0  # a scheduler may signal a process and its parent, which forwards it: that is one request


class Stopped(Exception):
    """The job was asked to stop. Training states are saved; what else was begun is made again."""

    def __init__(self, where: str):
        super().__init__(where)
        self.signal = signal.Signals(_received[0]).name if _received else "a signal to another process"
        self.exit_code = cli.INTERRUPTED if signal.SIGINT in _received else cli.TRY_AGAIN


_received: list[int] = []  # signals, oldest first
_since = 0.0  # time of the first
_asked = 0  # number of times that all processes have called requested()


def listen() -> None:
    """Note the signals from now on. In a multi-host job, call it after the processes are connected.

    There, JAX listens to SIGTERM and lets all processes agree on a step; the other signals are passed on as SIGTERM.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM or jax.process_count() == 1:
            signal.signal(number, _note)


def requested() -> bool:
    """True if the job is asked to stop, in all processes alike: each must call it equally often, as after each step."""
    global _asked  # noqa: PLW0603  JAX wants the number of the call
    if jax.process_count() == 1:
        return bool(_received)
    _asked += 1
    return multihost_utils.reached_preemption_sync_point(_asked)


def stop_if_requested(where: str) -> None:
    """Raise Stopped if the job is asked to stop; where: what was being done, for the message."""
    if requested():
        raise Stopped(where)


def _note(number: int, frame: FrameType | None) -> None:
    global _since  # noqa: PLW0603
    del frame
    now = time.monotonic()
    if not _received:
        _since = now
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
    elif now - _since > REPEAT_SECONDS:
        os._exit(128 + number)
    _received.append(number)
