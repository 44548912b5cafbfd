"""The program and its scripts as a user starts them: in a process of their own, on one device."""

import getpass
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = "--config=configs/tiny.py"
CACHE = (
    Path(tempfile.gettempdir()) / f"warp_jax_tests_{getpass.getuser()}"
)  # of data sets and compiled programs, shared by all runs
FAST_COMPILE = "--xla_backend_optimization_level=0"  # as in conftest.py
ENV = dict(os.environ) | {
    "XLA_FLAGS": FAST_COMPILE,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TFDS_DATA_DIR": str(CACHE / "tfds"),
}


def main_command(*arguments):
    """`python -m warp_jax.main` with arguments."""
    return [sys.executable, "-m", "warp_jax.main", *map(str, arguments)]


def script_command(name, *arguments):
    """A script of the repository with arguments."""
    return [sys.executable, f"scripts/{name}", *map(str, arguments)]


def run(command, **environment):
    """Run a command to its end, with these variables more."""
    env = ENV | environment
    return subprocess.run([*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def train(workdir, *settings):
    """Run a whole job; return its workdir."""
    result = run(main_command(*settings, f"--workdir={workdir}"))
    assert result.returncode == 0, result.stderr
    return workdir


def start(command, env=None):
    """Start a command that goes on by itself; `finish` or `kill` it."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*map(str, command)], cwd=ROOT, env=env or ENV, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    """Exit code, output and errors of a process that was started."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def wait_for(path, process):
    """Wait until the path is there; the process must go on meanwhile."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def kill_when(path, process):
    """Kill a process, with no chance to tidy up, as soon as the path is there."""
    wait_for(path, process)
    process.kill()
    process.communicate()
