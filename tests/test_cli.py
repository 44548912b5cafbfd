"""Flags that every program shares."""

import importlib.metadata
import platform
import sys

import pytest

from tests.commands import ROOT, main_command, run
from warp_jax import cli

HEAVY = "jax flax orbax optax tensorflow_datasets transformers torch pandas scipy sklearn matplotlib"
PROGRAMS = ["warp_jax/main.py", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("scripts/**/*.py")))]
NO_PROGRAMS = {name for name in PROGRAMS if name.startswith("scripts/speed/")}
SHOW_HELP = f"""import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))  # as for python FILE
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *sorted(sys.modules.keys() & set("{HEAVY}".split())))
"""


@pytest.mark.parametrize("program", sorted(set(PROGRAMS) - NO_PROGRAMS))
def test_help_waits_for_no_large_library(program):
    """Fails when a program imports JAX or another large library before its flags are parsed, or its help lacks them, or
    is larger than a screen.
    """
    result = run([sys.executable, "-c", SHOW_HELP, program])
    lines = result.stdout.splitlines()
    assert "imported:" in lines
    assert any(line.startswith(("  --", "* --")) for line in lines)
    assert len(lines) <= 50


def test_the_versions_are_printed_without_a_config():
    """Fails when --version asks for a config, does not exit with 0, or leaves out a library."""
    result = run(main_command("--version"))
    assert result.returncode == 0, result.stderr
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint")]
    first, *others = result.stdout.splitlines()
    assert first.startswith("warp_jax ")
    assert others == [*libraries, f"Python {platform.python_version()}"]


def test_an_error_cannot_control_the_terminal(capsys):
    """Fails when escape codes, or marks that reverse the text, come from a file name to the screen."""
    cli.print_error("a\x1b[2J\u202eb \u00fc")
    assert capsys.readouterr().err == "error: a\\x1b[2J\\u202eb \u00fc\n"


def test_an_error_inside_a_config_file_is_one_line(tmp_path):
    """Fails when the traceback that ml_collections puts into its message is printed, or its last line is not."""
    result = run(main_command("--config=configs/tiny.py:x", f"--workdir={tmp_path / 'run'}"))
    assert result.returncode == cli.BAD_INPUT
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.endswith("TypeError: get_config() takes 0 positional arguments but 1 was given\n")
