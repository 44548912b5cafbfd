"""Environment of this process: versions of the code and of the libraries, and the devices."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from warp_jax import cli

ROOT = Path(__file__).parents[2]  # of the repository, if warp_jax is not installed as a copy
LIBRARIES = ("warp_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def describe() -> dict[str, Any]:
    """Versions of the libraries that results depend on, the commit of warp_jax, Python, devices and XLA's flags."""
    return {
        "versions": {name: cli.version(name) for name in LIBRARIES},
        "commit": commit(),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def commit() -> str:
    """The commit of warp_jax, with "+" if files differ from it; "" if it is not installed from a git repository."""
    if not (ROOT / ".git").exists():  # git would look above, and find the repository of another project
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, PermissionError, subprocess.CalledProcessError):  # no git, or not for this user
        return ""


def requirements() -> str:
    """Every installed package with its version, as lines of a requirements file, after a comment with the commit.

    Raises OSError if no file can be opened: importlib leaves out a folder that it cannot list.
    """
    for folder in filter(os.path.isdir, sys.path):
        with contextlib.suppress(PermissionError):
            os.listdir(folder)
    installed = importlib.metadata.distributions()
    named = [(package.name, package.version) for package in installed if package.metadata]  # {}: a rest of another
    lines = {f"{name}=={version}" for name, version in named} - {_own()}
    return "\n".join([f"# {_own()} commit {commit()}", *sorted(lines, key=str.lower)]) + "\n"


def _own() -> str:
    return f"warp_jax=={cli.version('warp_jax')}"
