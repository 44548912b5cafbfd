"""Rows of metrics.jsonl."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax.training.metric_writer import MetricWriter, read_rows


def test_rows_are_written_as_numbers(tmp_path):
    """Mutation: the step left out; no flush, so that a kill loses the rows."""
    with contextlib.closing(MetricWriter(tmp_path)) as writer:
        writer.write(3, {"loss": jnp.float32(0.25), "kl": np.ones(()), "count": 7})
        assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 0.25, "kl": 1.0, "count": 7.0}]
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_rows_from_the_start_step_on_are_dropped(tmp_path):
    """Mutation: `<=` for `<`; nothing dropped; everything dropped."""
    with contextlib.closing(MetricWriter(tmp_path)) as writer:
        for step in range(5):
            writer.write(step, {"loss": step + 0.5})
    with contextlib.closing(MetricWriter(tmp_path, start_step=3)) as writer:
        writer.write(3, {"loss": 30})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 30)]


def test_a_fresh_writer_drops_all_rows(tmp_path):
    """Mutation: start_step defaults to None or infinity."""
    for loss in (1, 2):
        with contextlib.closing(MetricWriter(tmp_path / "stage")) as writer:
            writer.write(0, {"loss": loss})
    assert read_rows(tmp_path / "stage" / "metrics.jsonl") == [{"step": 0, "loss": 2}]


@pytest.mark.parametrize("cut", [b'{"step": 2, "lo', b'{"step": 2, "loss": 4', b"{", b'{"step": 2, "\xff": 4}\n'])
def test_a_line_cut_short_is_left_out(tmp_path, cut):
    """Mutation: the decoding errors not caught; the cut line kept in the file when it is opened again."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n'
    path.write_bytes(whole.encode() + cut)
    assert [row["step"] for row in read_rows(path)] == [0, 1]
    with contextlib.closing(MetricWriter(tmp_path, start_step=2)) as writer:
        writer.write(2, {"loss": 3.0})
    assert path.read_text() == whole + '{"step": 2, "loss": 3.0}\n'


def test_a_missing_file_has_no_rows(tmp_path):
    """Mutation: existence not checked."""
    assert read_rows(tmp_path / "metrics.jsonl") == []
