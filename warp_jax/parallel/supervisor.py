"""Run each process of a multi-host job as a child, so that its parent can report how it ended."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading

from warp_jax import cli
from warp_jax.parallel import stopping
from warp_jax.parallel.hosts import RESTART_HINT

_PARENT = "WARP_JAX_PARENT"  # environment variable: a pipe that closes when the parent ends


def continue_in_child() -> None:
    """Start the same command in a child process and return there; the parent waits and exits with the child's code.

    When another process of the job is gone, JAX aborts this one without a Python exception. The parent then prints one
    line and exits with TRY_AGAIN. If the parent ends, for any reason, the child ends too. Signals that ask to stop are
    passed on.
    """
    if inherited := os.environ.pop(_PARENT, ""):
        threading.Thread(target=_end_with_parent, args=(int(inherited),), daemon=True).start()
        faulthandler.disable()  # absl enabled it; it would print the stack of every thread when JAX aborts
        return
    watched, _held_open = os.pipe()
    command = [sys.executable, *sys.orig_argv[1:]]
    with subprocess.Popen(command, env=os.environ | {_PARENT: str(watched)}, pass_fds=[watched]) as child:
        for number in stopping.SIGNALS:
            signal.signal(number, lambda number, _: child.send_signal(number))
        code = child.wait()
    if code == -signal.SIGABRT:
        cli.fail(f"aborted by JAX, usually because another process is gone: {RESTART_HINT}", cli.TRY_AGAIN)
    sys.exit(code if code >= 0 else 128 - code)  # ended by a signal: 128 + its number, as in a shell


def _end_with_parent(watched: int) -> None:
    os.read(watched, 1)  # returns when the parent ends
    os._exit(cli.TRY_AGAIN)
