"""Mean, standard error and distinct n-grams against hand arithmetic."""

import math

import numpy as np
import pytest

from warp_jax.evaluation import statistics
from warp_jax.evaluation.statistics import distinct_n, mean_and_se


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


def test_standard_error_of_clusters_by_hand():
    """Mutation: clusters ignored; the factor G / (G - 1) or the division by N left out."""
    mean, error = mean_and_se([1, 2, 6, 7, 9], np.array([8, 3, 8, 3, 5]))  # deviations sum to -3, -1 and 4
    assert mean == 5
    assert error == pytest.approx(math.sqrt(3 / 2 * (9 + 1 + 16)) / 5)
    assert math.isnan(mean_and_se([1, 2], np.array([4, 4]))[1])


def test_resamples_draw_whole_clusters():
    """Mutation: rows drawn one by one; always the same number of rows; the first row resampled."""
    drawn = statistics.resample(np.array([7, 7, 2, 2, 2]), 500, 3)
    assert drawn.num_clusters == 2
    assert (drawn.counts[0] == 1).all()
    assert {tuple(row) for row in drawn.counts[1:].tolist()} == {(2, 2, 0, 0, 0), (1, 1, 1, 1, 1), (0, 0, 2, 2, 2)}
    means = drawn.means(np.array([1.0, 3.0, 10.0, 20.0, 30.0]))
    assert means[0] == pytest.approx(64 / 5)
    assert sorted(set(np.round(means, 9))) == pytest.approx([2.0, 12.8, 20.0])


def test_bootstrap_interval_matches_the_normal_one():
    """Mutation: rows drawn without replacement; percentiles swapped; another confidence."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    drawn = statistics.resample(np.arange(400), 2000, 1)
    found = statistics.bootstrap(lambda rows: values[rows].mean(), drawn)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.value - half, abs=0.03)
    assert found.high == pytest.approx(found.value + half, abs=0.03)
    assert found == pytest.approx(statistics.intervals(drawn.means(values)[None], 400)[0])


def test_intervals_of_few_clusters_are_as_wide_as_those_of_student():
    """Mutation: normal quantiles, which are 1.31 times too short for 6 clusters."""
    values = np.random.default_rng(0).normal(size=(1, 200_001))
    values[0, 0] = 0
    (found,) = statistics.intervals(values, 6)
    want = 2.5706 * math.sqrt(6 / 5)  # t quantile of 5 degrees of freedom
    assert (found.low, found.high) == pytest.approx((-want, want), abs=0.1)


@pytest.mark.parametrize("clusters", [1, 2, 5])
def test_too_few_clusters_have_a_value_without_bounds(clusters):
    """Mutation: bounds from the 3 resamples that 2 clusters have; they hold in 51 %."""
    means = statistics.resample(np.arange(clusters), 200, 0).means(np.arange(clusters) + 1.0)[None]
    for kind in (statistics.intervals, statistics.simultaneous_intervals):
        assert kind(means, clusters)[0] == pytest.approx(((clusters + 1) / 2, math.nan, math.nan), nan_ok=True)


def test_simultaneous_intervals_hold_together():
    """Mutation: pointwise width; the sum of deviations in place of the largest; values never reached not kept out."""
    values = np.random.default_rng(0).normal(size=(4, 20_001)) * np.array([[1.0], [3.0], [0.2], [1.0]])
    values[:, 0] = 0
    values[3, ::5] = np.nan
    found = statistics.simultaneous_intervals(values, 10_000)
    want = 2.388  # P(|z| < 2.388)^3 = 0.95
    assert [interval.high for interval in found[:3]] == pytest.approx([want, 3 * want, 0.2 * want], rel=0.02)
    assert np.isnan(found[3]).all()


@pytest.mark.parametrize("looks", [1, 2])
def test_resamples_that_reach_no_value_are_left_out(looks):
    """Mutation: the largest deviation of a resample in which all values are missing; it makes all bounds nan."""
    values = np.random.default_rng(0).normal(size=(looks, 1_001))
    values[:, 0] = 0
    values[:, 5:45] = np.nan
    found = statistics.simultaneous_intervals(values, 1_000)
    assert found == statistics.simultaneous_intervals(np.delete(values, range(5, 45), 1), 1_000)
    assert np.isfinite(found).all()


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


def test_half_width_of_an_interval():
    """Fails when the normal quantile, another degree of freedom or one side is taken, or few prompts have bounds."""
    assert statistics.half_width(10) == pytest.approx(2.262157, abs=1e-6)  # Student's t, 9 degrees of freedom, 97.5 %
    assert math.isnan(statistics.half_width(5))
