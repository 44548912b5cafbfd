"""Rows on disk and the statistics of tables."""

import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax import files
from warp_jax.metrics import MetricWriter, distinct_n, mean_and_se, read_rows


def test_mean_and_se_by_hand():
    """Mutation: ddof 0; the deviation not divided by sqrt(N)."""
    mean, error = mean_and_se([1, 2, 6, 7])  # deviations -3 -2 2 3, squares add up to 26
    assert mean == 4
    assert error == pytest.approx(math.sqrt(26 / 3) / 2)


def test_mean_of_one_value_has_no_error():
    """Mutation: an error of 0."""
    mean, error = mean_and_se([2.5])
    assert mean == 2.5
    assert math.isnan(error)


def test_mean_of_float32_values_is_summed_in_float64():
    """Mutation: np.asarray without a dtype."""
    mean, error = mean_and_se(np.array([2**24, 1, 1, 1], np.float32))
    assert mean == (2**24 + 3) / 4
    assert isinstance(mean, float)
    assert isinstance(error, float)


@pytest.mark.parametrize(
    ("rows", "n", "want"),
    [
        ([[1, 2, 1, 2, 3]], 1, 3 / 5),
        ([[1, 2, 1, 2, 3]], 2, 3 / 4),  # 12 21 12 23
        ([[1, 2, 1, 2, 3]], 3, 1.0),
        ([[1, 2], [1, 2, 3]], 2, 2 / 3),  # no 2-gram runs from one row into the next
        ([[5], [1, 2, 1, 2]], 2, 2 / 3),
        ([[1, 2], [2, 1]], 2, 1.0),
    ],
)
def test_distinct_n_by_hand(rows, n, want):
    """Mutation: the last n-gram of a row left out; rows joined; averaged over rows; order within an n-gram dropped."""
    assert distinct_n(rows, n) == pytest.approx(want)


@pytest.mark.parametrize("rows", [[], [[1]], [[1], []]])
def test_distinct_n_of_nothing_is_nan(rows):
    """Mutation: 0 where there is no n-gram."""
    assert math.isnan(distinct_n(rows, 2))


def test_rows_are_written_as_numbers(tmp_path):
    """Mutation: the step left out; no flush, so that a kill loses the rows."""
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": jnp.float32(0.25), "kl": np.ones(()), "count": 7})
        assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 0.25, "kl": 1.0, "count": 7.0}]
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_rows_from_the_start_step_on_are_dropped(tmp_path):
    """Mutation: `<=` for `<`; nothing dropped; everything dropped."""
    with MetricWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, {"loss": step + 0.5})
    with MetricWriter(tmp_path, start_step=3) as writer:
        writer.write(3, {"loss": 30})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 30)]


def test_a_fresh_writer_drops_all_rows(tmp_path):
    """Mutation: start_step defaults to None or infinity."""
    for loss in (1, 2):
        with MetricWriter(tmp_path / "stage") as writer:
            writer.write(0, {"loss": loss})
    assert read_rows(tmp_path / "stage" / "metrics.jsonl") == [{"step": 0, "loss": 2}]


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', '{"step": 2, "loss": 4', "{"])
def test_a_line_cut_short_is_left_out(tmp_path, cut):
    """Mutation: the decoding error not caught; the cut line kept in the file when it is opened again."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n'
    path.write_text(whole + cut)
    assert [row["step"] for row in read_rows(path)] == [0, 1]
    with MetricWriter(tmp_path, start_step=2) as writer:
        writer.write(2, {"loss": 3.0})
    assert path.read_text() == whole + '{"step": 2, "loss": 3.0}\n'


def test_a_missing_file_has_no_rows(tmp_path):
    """Mutation: existence not checked."""
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_write_text_makes_directories_and_leaves_one_file(tmp_path):
    """Mutation: parents not made; a copy in place of a rename."""
    path = tmp_path / "a" / "b" / "note.txt"
    files.write_text(path, "first, longer")
    files.write_text(path, "zwölf")
    assert path.read_bytes() == "zwölf".encode()
    assert list(path.parent.iterdir()) == [path]


def test_write_text_keeps_the_old_file_when_the_rename_fails(tmp_path, monkeypatch):
    """Mutation: written straight to the path; the old file deleted first."""
    path = tmp_path / "note.txt"
    files.write_text(path, "old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_json_there_and_back(tmp_path):
    """Mutation: keys sorted; text not indented; no newline at the end."""
    path = tmp_path / "value.json"
    value = {"b": [1, 2.5, None], "a": {"text": "é"}}
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert path.read_text(encoding="utf-8").startswith('{\n  "b": [\n')
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert json.loads(path.read_bytes()) == value
