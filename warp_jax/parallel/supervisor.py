"""The parent process of a process of a multi-host job."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading

from warp_jax import cli
from warp_jax.parallel.hosts import RESTART_HINT

_PARENT = "WARP_JAX_PARENT"  # environment: a file descriptor that ends when the parent does


def continue_in_child() -> None:
    """Return in a child that runs the same command; the parent waits for it, and ends as it does.

    JAX's runtime aborts a process, past all Python, when it hears that another one is gone. The parent says so in one
    line, with exit code TRY_AGAIN. However the parent is ended, the child ends too.
    """
    if inherited := os.environ.pop(_PARENT, ""):
        threading.Thread(target=_end_with_parent, args=(int(inherited),), daemon=True).start()
        faulthandler.disable()  # absl's, which would print every thread's stack when JAX aborts
        return
    watched, _held_open = os.pipe()
    command = [sys.executable, *sys.orig_argv[1:]]
    code = subprocess.call(command, env=os.environ | {_PARENT: str(watched)}, pass_fds=[watched])
    if code == -signal.SIGABRT:
        cli.fail(f"aborted by JAX, most often because another process is gone: {RESTART_HINT}", cli.TRY_AGAIN)
    sys.exit(code if code >= 0 else 128 - code)  # 128 + signal, as shells say it


def _end_with_parent(watched: int) -> None:
    os.read(watched, 1)  # returns when the other end is closed
    os._exit(cli.TRY_AGAIN)
