"""Fronts against hand-made points."""

import functools

import numpy as np
import pytest

from warp_jax.evaluation import pareto

KL = np.array([0.0, 1.0, 4.0, 2.0, 4.5])
REWARD = np.array([0.0, 2.0, 5.0, 1.5, 4.0])


def test_non_dominated():
    """Fails when either inequality is reversed."""
    assert pareto.non_dominated(KL, REWARD).tolist() == [True, True, True, False, False]


def test_more_kl_for_the_same_reward_is_dominated():
    """Fails when only a higher reward counts as better."""
    assert pareto.non_dominated(np.array([1.0, 2.0]), np.array([3.0, 3.0])).tolist() == [True, False]


def test_equal_points_are_both_kept():
    """Fails when `better` allows equality: twins would remove each other."""
    assert pareto.non_dominated(np.array([1.0, 1.0]), np.array([2.0, 2.0])).all()


@pytest.mark.parametrize(("kl", "reward"), [(0.25, 0.5), (1.0, 2.0), (1.9, 2.9), (4.0, 5.0)])
def test_reward_at_kl_is_linear_along_the_front(kl, reward):
    """Fails when dominated points are left in, or points are not sorted by KL."""
    assert pareto.reward_at_kl(KL, REWARD, kl) == pytest.approx(reward)


@pytest.mark.parametrize(("reward", "kl"), [(0.5, 0.25), (2.0, 1.0), (2.9, 1.9), (5.5, np.nan)])
def test_kl_at_reward_is_the_inverse(reward, kl):
    """Fails when dominated points are left in, points are sorted by KL alone, or the ends are extrapolated."""
    assert pareto.kl_at_reward(KL, REWARD, reward) == pytest.approx(kl, nan_ok=True)


def test_reward_outside_the_front_is_nan():
    """Fails when np.interp extrapolates the ends."""
    assert np.isnan(pareto.reward_at_kl(KL, REWARD, 4.2))


def test_bootstrap_interval_matches_the_normal_one():
    """Fails when rows are drawn without replacement, or the percentiles are swapped."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = pareto.bootstrap(lambda rows: values[rows].mean(), 400, resamples=2000, seed=1)
    half = 1.96 * values.std() / 20
    assert found.value == values.mean()
    assert found.low == pytest.approx(found.value - half, abs=0.03)
    assert found.high == pytest.approx(found.value + half, abs=0.03)


def test_reward_gained_is_second_minus_first():
    """Fails when the sign is wrong, or the two fronts are resampled separately."""
    noise = np.random.default_rng(0).normal(size=300)
    kl = np.stack([np.zeros(300), np.ones(300), 3 * np.ones(300)])
    reward = np.stack([noise, 1 + noise, 2 + noise])
    gained = functools.partial(pareto.reward_gained, at=2.0)
    found = pareto.bootstrap_means(gained, (kl, reward, kl, reward + 0.3), resamples=50, seed=0)
    assert found == pytest.approx((0.3, 0.3, 0.3))


def test_common_kls():
    """Fails when the union of the ranges is taken, or a dominated point widens a range."""
    up = np.array([0.0, 1.0])
    assert pareto.common_kls(np.array([0.0, 4.0]), up, np.array([1.0, 9.0]), up, 2).tolist() == [2.0, 3.0]
    assert not len(pareto.common_kls(np.array([0.0, 1.0]), up, np.array([2.0, 3.0]), up, 2))
    worse = np.array([0.0, 4.0, 8.0]), np.array([0.0, 1.0, 0.5])
    assert pareto.common_kls(*worse, np.array([1.0, 9.0]), up, 2).tolist() == [2.0, 3.0]
