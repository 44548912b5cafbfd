"""A time limit for user functions, which may hang in any way.

The function runs in a thread, and the caller waits for it. Code in C, such as a regular expression, may also keep
Python's lock (the GIL) for ever: then no Python code can run, and timers of the C library end the process.
"""

import contextlib
import ctypes
import functools
import os
import queue
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from warp_jax import exit_codes

GRACE = 5.0  # seconds from the limit to the end of the process, if the caller cannot run


class _SigEvent(ctypes.Structure):
    """struct sigevent of Linux, with which a timer calls a function in a thread of its own."""

    _fields_ = (
        ("value", ctypes.c_void_p),  # argument of the function
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),  # SIGEV_THREAD = 2
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


def run(action: Callable[[], Any], seconds: float | None, message: str) -> "futures.Future[Any]":
    """Run action() in a daemon thread that all calls share; return a future with its result or its exception.

    The process returns to its current folder if action() has changed it: the paths of a job may be relative.

    seconds: the limit; None = no limit. If the thread still holds the GIL GRACE seconds after the limit, the process
    prints `message` as an error and exits with code 70 (only on systems with timer_create, such as Linux).

    Raises:
        TimeoutError: the limit is exceeded. The thread may still run, so the process should end by os._exit.
    """
    future: futures.Future[Any] = futures.Future()
    started = time.monotonic()
    # the timers start before the thread, which may never release the GIL
    with _ended_by_timers(seconds, message), contextlib.chdir(os.getcwd()):
        _thread().put((action, future))
        futures.wait([future], seconds)
    if not future.done():
        _thread.cache_clear()
    elif seconds is None or time.monotonic() - started <= seconds:
        return future
    raise TimeoutError(message)


@functools.cache
def _thread() -> "queue.SimpleQueue[tuple[Callable[[], Any], futures.Future[Any]]]":
    calls: queue.SimpleQueue[tuple[Callable[[], Any], futures.Future[Any]]] = queue.SimpleQueue()

    def serve() -> None:
        while True:
            action, future = calls.get()
            try:
                future.set_result(action())
            except BaseException as error:  # exit calls too
                future.set_exception(error)

    threading.Thread(target=serve, name="rewards", daemon=True).start()
    return calls


@contextlib.contextmanager
def _ended_by_timers(seconds: float | None, message: str) -> Iterator[None]:
    """Start two timers of the C library: one prints the message, one ends the process. They need no GIL."""
    library: Any = ctypes.CDLL(None)
    if seconds is None or not hasattr(library, "timer_create"):
        yield
        return
    command = ctypes.create_string_buffer(
        f"printf '%s\\n' {shlex.quote(f'error: {message}')} >&2".encode(errors="replace")
    )
    with (
        _timer(library, seconds + GRACE, library.system, ctypes.addressof(command)),
        _timer(library, seconds + GRACE + 1, library._exit, exit_codes.USER_FUNCTION),
    ):
        yield


@contextlib.contextmanager
def _timer(library: Any, seconds: float, function: Any, value: int) -> Iterator[None]:
    """Call function(value) after `seconds`, unless the block ends before, or the system has no timer left."""
    timer = ctypes.c_void_p()
    event = _SigEvent(value=value, notify=2, function=ctypes.cast(function, ctypes.c_void_p).value)
    if library.timer_create(1, ctypes.byref(event), ctypes.byref(timer)):  # 1: the monotonic clock
        yield
        return
    try:
        interval_and_start = (ctypes.c_long * 4)(0, 0, int(seconds), int(seconds % 1 * 1e9))  # seconds, nanoseconds
        library.timer_settime(timer, 0, ctypes.byref(interval_and_start), None)
        yield
    finally:
        library.timer_delete(timer)
