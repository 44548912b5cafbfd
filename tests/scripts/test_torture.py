"""The judgement of disturbed jobs; tests/test_main.py stops and kills one for real."""

import random

import pytest

from scripts import torture

SAME = {"front.csv": "a", "sft/metrics.jsonl": "b"}


@pytest.mark.parametrize(
    ("code", "errors", "found", "wanted"),
    [
        (0, "warning: continuing from step 3", SAME, "equal"),
        (0, "", {**SAME, "front.csv": "c"}, "silently different"),
        (0, "", {"front.csv": "a"}, "silently different"),
        (74, "a line\nerror: x is not what was written", {}, "named"),
        (2, "error: bad config", {}, "named"),
        (1, "error: bad config", {}, "no line"),
        (74, "error: a\nerror: b", {}, "no line"),
        (74, "", {}, "no line"),
        (74, "Traceback (most recent call last):\nerror: x", {}, "traceback"),
        (0, "Traceback (most recent call last):", SAME, "traceback"),
        (-9, "", SAME, "no line"),
    ],
)
def test_an_end_is_judged(code, errors, found, wanted):
    """Fails when another result, a traceback or a silent end counts as held."""
    assert torture.outcome(torture.Ended(code, errors), found, SAME) == wanted


def test_one_bit_is_flipped(tmp_path):
    """Fails when nothing, or more than one bit, changes, or an empty file is chosen."""
    (tmp_path / "empty").touch()
    for number in range(20):
        (tmp_path / "x").write_bytes(bytes(5))
        assert torture.flip(tmp_path, random.Random(number)).endswith(" of x")
        assert sum(byte.bit_count() for byte in (tmp_path / "x").read_bytes()) == 1


def test_the_table_counts_what_held():
    rows = [{"kind": "kill", "outcome": "equal"}, {"kind": "flip", "outcome": "named"}]
    rows += [{"kind": "flip", "outcome": "traceback"}] * 2
    assert torture.table(rows).splitlines()[2:] == ["| kill | 1 | 1 |  |", "| flip | 3 | 1 | 2 traceback |"]
