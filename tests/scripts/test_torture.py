"""The judgement of disturbed jobs; tests/test_main.py stops and kills one for real."""

import random
import shutil

import jax.numpy as jnp
import pytest

from scripts import torture
from warp_jax.storage import checkpoint

SAME = {"front.csv": "a", "sft/metrics.jsonl": "b"}


@pytest.mark.parametrize(
    ("code", "errors", "found", "wanted"),
    [
        (0, "warning: continuing from step 3", SAME, "equal"),
        (0, "", {**SAME, "front.csv": "c"}, "silently different: front.csv"),
        (0, "", {"front.csv": "a"}, "silently different: sft/metrics.jsonl"),
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


def test_a_file_is_damaged_in_one_place(tmp_path):
    """Fails when nothing, or more than one bit, changes, or a file never gets shorter."""
    sizes = set()
    for number in range(20):
        (tmp_path / "x").write_bytes(bytes(5))
        torture.damage(tmp_path / "x", random.Random(number))
        content = (tmp_path / "x").read_bytes()
        sizes.add(len(content))
        assert sum(byte.bit_count() for byte in content) == (len(content) == 5)
    assert len(sizes) > 2


def test_results_are_all_files_but_those_that_vary(tmp_path):
    """Fails when a file of a job is not compared, or one that differs between any two jobs is."""
    for name in ("config.json", "sft/metrics.jsonl", "report.html", "sft/events.out.tfevents.1.x", "starts.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    checkpoint.save_params(tmp_path / "sft" / "params", {"a": jnp.arange(3.0)})
    found = torture.hashes(tmp_path)
    assert set(found) == {"config.json", "sft/metrics.jsonl", "sft/params"}
    shutil.rmtree(tmp_path / "sft" / "params")
    checkpoint.save_params(tmp_path / "sft" / "params", {"a": jnp.arange(3.0) + 1e-7})
    assert torture.hashes(tmp_path)["sft/params"] != found["sft/params"]


def test_the_table_counts_what_held():
    rows = [{"kind": "kill", "outcome": "equal"}, {"kind": "flip", "outcome": "named"}]
    rows += [{"kind": "flip", "outcome": "traceback"}] * 2
    assert torture.table(rows).splitlines()[2:] == ["| kill | 1 | 1 |  |", "| flip | 3 | 1 | 2 traceback |"]
