"""The numbers of the summary, on points made by hand."""

import json

import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.evaluation import summary
from warp_jax.evaluation.measure import Evaluation
from warp_jax.evaluation.points import Point


def _point(stage, iteration, eta, reward, kl):
    noise = reward * np.array([-0.1, 0.0, 0.0, 0.1])
    columns = reward + noise, reward - 1 + noise, np.full(4, kl), np.full(4, 5)
    values = Evaluation(*columns, np.array(0.5), None, None, np.arange(4))
    return Point(stage, iteration, 0, eta, 0, values)


def _twice(point):
    """The same point, measured on twice as many prompts: 4 are too few for an interval."""
    columns = {name: np.tile(getattr(point.evaluation, name), 2) for name in ("reward", "gold_reward", "sft_kl")}
    return point._replace(evaluation=point.evaluation._replace(**columns, clusters=np.arange(8)))


def _points():
    """Two straight fronts through SFT at (0 nats, reward 1): slopes 1.0 and 1.5."""
    nan = float("nan")
    return [
        _point("sft", 0, 0.0, 1.0, 0.0),
        _point("merged", 1, nan, 3.0, 2.0),
        _point("liti", 1, 0.5, 2.0, 1.0),
        _point("liti", 1, 1.0, 3.0, 2.0),
        _point("merged", 2, nan, 7.0, 4.0),
        _point("liti", 2, 0.2, 2.2, 0.8),
        _point("liti", 2, 0.5, 4.0, 2.0),
        _point("liti", 2, 1.0, 7.0, 4.0),
    ]


def _summary(budget):
    return summary.summarise(settings_of({"front.kl_budget": budget}), _points())


def test_fronts_are_compared_second_minus_first():
    """Fails when the sides are swapped, or KLs outside the common range (0 to 2 nats) are taken."""
    (entry,) = _summary(0.0)["iterations_compared"]
    assert entry["iterations"] == [1, 2]
    kls = [found["sft_kl"] for found in entry["reward_difference"]]
    assert kls == pytest.approx(np.linspace(0, 2, 7)[1:-1])
    assert [found["value"] for found in entry["reward_difference"]] == pytest.approx([0.5 * kl for kl in kls])


def test_the_best_eta_under_the_budget_is_of_the_last_front():
    """Fails when an earlier front, the lowest KL, or an eta over the budget is chosen."""
    assert _summary(2.5)["best_eta_under_budget"]["eta"] == 0.5
    assert _summary(1.0)["best_eta_under_budget"]["eta"] == 0.2
    assert _summary(0.5)["best_eta_under_budget"] is None
    assert "best under 0.5 nats: no eta" in summary.one_line(_summary(0.5))
    assert "eta 0.5 with reward 4" in summary.one_line(_summary(2.5))
    assert _summary(2.5)["best_eta_under_budget"]["probability_within_budget"] == 1


def test_fronts_that_share_no_kl_are_not_compared():
    """Fails when policies that never left SFT end the report with an error, or with a division by 0."""
    points = [_point(point.stage, point.iteration, point.eta, 1.0, 0.0) for point in _points()]
    numbers = summary.summarise(settings_of(), [*points, _point("policy", 2, float("nan"), 1.0, 0.0)])
    assert numbers["iterations_compared"] == [{"iterations": [1, 2], "reward_difference": []}]
    assert [row["kl_saved"] for row in numbers["front_against_runs"]] == [None]


def test_gain_is_the_last_merge_minus_sft_in_paired_standard_errors():
    """Fails when the gain is of another iteration, or its standard error is unpaired."""
    points = _points()
    points[4].evaluation.reward[:] = points[0].evaluation.reward + np.array([1, 2, 3, 4])
    numbers = summary.summarise(settings_of(), points)
    assert numbers["final_reward"] == pytest.approx(3.5)
    assert numbers["gain_in_standard_errors"] == pytest.approx(2.5 / (np.std([1, 2, 3, 4], ddof=1) / 2))


def test_equal_gains_have_no_standard_error():
    """Fails when a gain is divided by 0, which json.dumps writes as Infinity."""
    points = _points()
    points[4].evaluation.reward[:] = points[0].evaluation.reward + 0.5
    numbers = summary.summarise(settings_of(), points)
    assert numbers["gain_in_standard_errors"] is None
    assert "no spread" in summary.one_line(numbers)
    json.dumps(numbers, allow_nan=False)


def test_the_area_of_the_gold_gap_is_along_the_front():
    """Fails when the gap is the reward's gain minus gold's, etas count in place of KLs, or another front is taken."""
    noise = np.arange(8.0) % 2
    points = []
    for stage, iteration, eta, kl, gain, gold_gain in (
        ("sft", 0, 0.0, 0.0, 0.0, 0.0),
        ("merged", 1, np.nan, 9.0, 9.0, 9.0),
        ("liti", 1, 1.0, 5.0, 3.0, -0.5),
        ("liti", 1, 0.3, 1.0, 1.0, 1.5),
    ):
        values = noise + gain, 5 * (noise + gold_gain), np.full(8, kl), np.full(8, 5)
        evaluation = Evaluation(*values, np.array(0.5), None, None, np.arange(8))
        points.append(Point(stage, iteration, 0, eta, 0, evaluation))
    settings = settings_of({"warp.num_iterations": 1, "warp.steps_per_iteration": (5,)})
    spread = noise.std(ddof=1)
    gaps = 0.5 / spread, -3.5 / spread
    (area,) = summary.summarise(settings, points)["gold_gap_areas"]
    assert area["value"] == pytest.approx(gaps[0] / 2 * 1 + (gaps[0] + gaps[1]) / 2 * 4)
    assert (area["iteration"], area["low"], area["high"]) == (1, pytest.approx(area["value"]), area["low"])


def test_equal_prompts_count_once():
    """Fails when four completions of two prompts are resampled as four prompts."""
    points = [p._replace(evaluation=p.evaluation._replace(clusters=np.array([0, 1, 1, 0]))) for p in _points()]
    points[4].evaluation.reward[:] = points[0].evaluation.reward + np.array([1, 2, 4, 4])
    numbers = summary.summarise(settings_of(), points)
    assert (numbers["held_out_completions"], numbers["distinct_prompts"]) == (4, 2)
    assert "4 completions of 2 distinct prompts" in summary.one_line(numbers)
    assert numbers["gain_in_standard_errors"] == pytest.approx(2.75 / 0.25)  # sums of deviations: -0.5 and 0.5


def test_a_front_is_set_against_the_runs_of_its_own_iteration():
    """Fails when the sign is wrong, another iteration's front or runs are taken, or the share is of the front's KL."""
    run = _point("policy", 2, float("nan"), 2.0, 1.6)._replace(run=1, step=60)
    beyond = _point("policy", 2, float("nan"), 8.0, 5.0)._replace(run=2, step=60)
    other = _point("policy", 1, float("nan"), 1.5, 1.0)
    rows = summary.summarise(settings_of(), [_twice(p) for p in (*_points(), run, beyond, other)])["front_against_runs"]
    assert [(row["iteration"], row["run"]) for row in rows] == [(1, 0), (2, 1), (2, 2)]
    assert rows[0]["reward_above"] == pytest.approx(2.0 - 1.5)
    assert rows[1]["reward_above"] == pytest.approx((2.2 + 1.8 * 0.8 / 1.2) - 2.0)
    assert rows[1]["kl_saved"] == pytest.approx(1 - 0.8 / 1.2 / 1.6)
    assert rows[1]["reward_above_low"] < rows[1]["reward_above"] < rows[1]["reward_above_high"]
    assert rows[2]["reward_above"] is None
    assert rows[2]["kl_saved"] is None
