"""Hostile input; the counts of docs/reliability.md come from longer runs of the same script."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import fuzz

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("code", "errors", "left", "wanted"),
    [
        (0, "", True, "taken"),
        (2, "error: x\n", False, "refused"),
        (74, "note: y\nerror: x\n", False, "refused"),
        (2, "error: x\n", True, "something left behind"),
        (2, "error: x\nerror: y\n", False, "no single line: code 2"),
        (2, "", False, "no single line: code 2"),
        (1, "error: x\n", False, "no single line: code 1"),
        (0, "Traceback (most recent call last):", False, "traceback"),
        (-signal.SIGALRM, "", False, "hang"),
        (-signal.SIGSEGV, "", False, "signal 11"),
    ],
)
def test_an_end_is_judged(code, errors, left, wanted):
    """Fails when a traceback, a hang, a crash, several lines or a file left behind counts as held."""
    assert fuzz.judge(code, errors, left) == wanted


@pytest.mark.slow
def test_a_few_inputs_of_each_kind(tmp_path):
    """Fails when an input at any door ends in a traceback."""
    command = [
        sys.executable,
        "scripts/fuzz.py",
        "--config=configs/tiny.py",
        "--trials=8",
        f"--out={tmp_path / 'bad.csv'}",
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("8 tried") == 4
