"""Flags that every program shares."""

import importlib.metadata
import platform

from tests.commands import main_command, run


def test_the_versions_are_printed_without_a_config():
    """Fails when --version asks for a config, does not exit with 0, or leaves out a library."""
    result = run(main_command("--version"))
    assert result.returncode == 0, result.stderr
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint")]
    first, *others = result.stdout.splitlines()
    assert first.startswith("warp_jax ")
    assert others == [*libraries, f"Python {platform.python_version()}"]
