"""Limits of config.health."""

import types

import numpy as np
import pytest

from warp_jax.evaluation import guards, measure
from warp_jax.settings.groups import Health
from warp_jax.types import GuardError

SFT = {"reward": 0.0, "reward_se": 0.1, "gold_reward": 1.0, "gold_reward_se": 0.2, "sft_kl": 0.0, "length": 20.0}
SFT["distinct_2"] = 0.6
OFF = {"max_kl": 0, "max_length_ratio": 0, "max_truncated": 0, "min_distinct_2": 0, "max_gold_drop": 0}


def _steps(health, **means):
    means = {"anchor_kl": 0.0, "length": 20.0, "truncated": 1.0} | means
    return dict(guards.of_steps(health, means, 20.0))


def _evaluations(health, *rows):
    """Findings in the last of these evaluations, every 10 steps."""
    return dict(guards.of_evaluations(health, {10 * i: SFT | row for i, row in enumerate([{}, *rows])}, 10 * len(rows)))


def test_each_limit_is_compared_with_its_own_mean():
    """Fails when a limit is compared with another number, a ratio is upside down, or one side of it is left out."""
    assert _steps(Health()) == {}
    assert list(_steps(Health(max_kl=5.0), anchor_kl=5.1)) == ["max_kl"]
    assert _steps(Health(max_kl=5.0), anchor_kl=4.9) == {}
    for length, found in ((61.0, True), (59.0, False), (6.6, True), (6.7, False)):
        assert list(_steps(Health(max_length_ratio=3.0), length=length)) == ["max_length_ratio"] * found
    assert list(_steps(Health(max_truncated=0.8), truncated=0.81)) == ["max_truncated"]
    assert _steps(Health(max_truncated=0.8), truncated=0.79) == {}


def test_each_limit_is_compared_with_its_own_part_of_an_evaluation():
    """Fails when distinct_2 is not relative to SFT's, or a limit is compared with another number."""
    assert _evaluations(Health(), {"sft_kl": 199.0, "distinct_2": 0.07}) == {}
    assert list(_evaluations(Health(), {"sft_kl": 201.0})) == ["max_kl"]
    assert list(_evaluations(Health(), {"distinct_2": 0.05})) == ["min_distinct_2"]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"reward": 2.0, "gold_reward": -1.0}], True),
        ([{"reward": 2.0, "gold_reward": 2.0}, {"reward": 4.0, "gold_reward": 0.5}], True),  # falls from its best
        ([{"reward": 2.0, "gold_reward": 0.5}], False),  # 0.5 is 1.8 standard errors of the difference
        ([{"reward": 0.4, "gold_reward": -1.0}], False),  # 0.4 is 2.8 standard errors of the difference
        ([{"reward": -2.0, "gold_reward": -1.0}], False),  # both fall
        ([{"reward": 2.0, "gold_reward": np.nan, "gold_reward_se": np.nan}], False),  # a job without gold reward
    ],
)
def test_the_gold_reward_may_not_fall_while_the_reward_rises(rows, found):
    """Fails when one of the two differences is not looked at, or standard errors are not those of a difference."""
    assert list(_evaluations(Health(max_gold_drop=3.0), *rows)) == ["max_gold_drop"] * found


def test_limits_of_0_are_off():
    """Fails when 0 is a limit: all would exceed it."""
    health = Health(**OFF)
    assert _steps(health, anchor_kl=1e9, length=1e9) == {}
    assert _evaluations(health, {"sft_kl": 1e9, "distinct_2": 0.0, "reward": 9.0, "gold_reward": -9.0}) == {}


@pytest.fixture
def evaluation(monkeypatch):
    """Evaluations that are their own summaries."""
    monkeypatch.setattr(measure, "summary", lambda evaluation: SFT | vars(evaluation))
    return types.SimpleNamespace


def _step_values(kl):
    return {"anchor_kl": kl, "length": 20.0, "truncated": 0.0}


def test_a_warning_is_printed_once(evaluation):
    """Fails when it is printed after each step, ends the run, or comes before the mean is over the limit."""
    lines = []
    guard = guards.Guards(Health(max_kl=5.0), "iteration 1 run 2", evaluation(), lines.append)
    guard.on_step(7, {})
    for done in range(8, 30):
        guard.on_step(done, _step_values(0.0 if 12 <= done < 18 else 10.0))  # the first four: too few for a mean
        guard.stop()
    line = "warning: iteration 1 run 2 step 23: KL to the anchor is 6 nats, limit config.health.max_kl = 5"
    assert lines == [line]


def test_a_guard_can_stop_the_run(evaluation):
    """Fails when `stop` only warns, or later evaluations are not compared with known ones."""
    health = Health(action="stop", max_gold_drop=3.0)
    guard = guards.Guards(health, "iteration 1 run 2", evaluation(), lambda line: None)
    guard.know(3, evaluation(reward=2.0, gold_reward=4.0))
    guard.on_evaluation(6, evaluation(reward=3.0, gold_reward=3.9))
    guard.stop()
    guard.on_evaluation(9, evaluation(reward=4.0, gold_reward=2.0))
    with pytest.raises(
        GuardError, match=r"run 2 step 9: since step 3 the .* rose by 2 .*health\.max_gold_drop = 3; the"
    ):
        guard.stop()
