"""What a replay prints, and the files that it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.diagnosis import replay
from warp_jax.experiment import workdir

NAN, INF = float("nan"), float("inf")


def test_the_first_bad_quantity_is_named_with_its_rows_and_weights():
    """Fails when the order is another, finite rows are named, infinities pass, or rows are those of the batch."""
    quantities = {
        "weights": {"a": jnp.ones(3)},
        "reward": jnp.array([0.0, -INF, 1.0, NAN]),
        "logps": np.array([[0.0, 1.0], [2.0, NAN], [3.0, 4.0], [5.0, 6.0]]),
        "loss": jnp.array(NAN),
        "gradient": {"a": {"b": jnp.array([NAN, INF, 1.0])}, "c": jnp.array([2])},
    }
    step = replay.Step(quantities, "split 'prompts'", np.array([70, 80, 90, 60]), ["p", "q", "r", "s"])
    text, broken = replay.describe(step)
    assert broken
    assert text.splitlines() == [
        "weights   finite",
        "reward    row 80: -inf; row 60: nan",
        "logps     row 80: nan",
        "loss      value: 1 nan",
        "gradient  a/b: 1 nan, 1 inf",
        "not finite first: reward",
        "row 80 of split 'prompts': q",
        "row 60 of split 'prompts': s",
    ]


def test_a_finite_step_is_not_reproduced():
    """Fails when a finite step counts as broken: its exit code would be 2."""
    text, broken = replay.describe(replay.Step({"loss": jnp.array(1.0)}, "split", np.arange(2), ["p", "q"]))
    assert (text.splitlines()[-1], broken) == ("not reproduced: all numbers of this step are finite", False)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"part": "sft", "step": 10},
        {"part": "sft", "step": -1},
        {"part": "sft", "step": True},
        {"part": "sft", "step": "1"},
        {"part": ["sft"], "step": 1},
        {"part": "iteration 3 run 1", "step": 1},
        {"part": "iteration 1 run 0", "step": 1},
        {"part": "../sft", "step": 1},
    ],
)
def test_a_file_of_another_job_is_refused(content, tmp_path):
    """Fails when a part, a step or a type is not checked: training would start, or end in a traceback."""
    path = tmp_path / "replay_1.json"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError,
        match=r"replay_1\.json: got part .* and step .*, want those of this job; give a file that this job wrote$",
    ):
        replay.read(path, settings_of())
    path.write_text(json.dumps({"part": "iteration 2 run 2", "step": 5}))
    assert replay.read(path, settings_of()) == ("iteration 2 run 2", 5)


def test_nothing_is_made_that_is_missing(tmp_path):
    """Fails when a replay trains SFT, or another input of its part, and saves it."""
    for name in ("tokenizer.json", "sft/params", "gold/gold.json", "reward_model/params", "iteration_1/merged"):
        with pytest.raises(ValueError, match=f"{name} is missing, and iteration 2 run 1 needs it"):
            workdir.check_ingredients(settings_of(), tmp_path, "iteration 2 run 1", 2)
        (tmp_path / name).mkdir(parents=True)
    workdir.check_ingredients(settings_of(), tmp_path, "iteration 2 run 1", 2)
