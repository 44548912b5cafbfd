"""Comparing policies by their KL (lower is better) and their reward (higher is better)."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A value and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


class FrontComparison(NamedTuple):
    """Reward of front b minus reward of front a at one KL (nats), with its confidence interval."""

    kl: float
    difference: Interval


def non_dominated(kl: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Pareto front, bool [K]: True unless another point is no worse in KL and reward and better in one of them."""
    no_worse = (kl[None, :] <= kl[:, None]) & (reward[None, :] >= reward[:, None])
    better = (kl[None, :] < kl[:, None]) | (reward[None, :] > reward[:, None])
    return ~np.any(no_worse & better, axis=1)


def reward_at_kl(kl: np.ndarray, reward: np.ndarray, at: float) -> float:
    """Reward that the front of K points reaches at one KL, interpolated linearly; nan outside the front's range."""
    front = non_dominated(kl, reward)
    return _interpolate(kl[front], reward[front], at)


def kl_at_reward(kl: np.ndarray, reward: np.ndarray, at: float) -> float:
    """KL at which the front of K points reaches one reward: the inverse of `reward_at_kl`."""
    front = non_dominated(kl, reward)
    return _interpolate(reward[front], kl[front], at)


def best_under_budget(kl: np.ndarray, reward: np.ndarray, budget: float) -> int | None:
    """Index of the point with the highest reward among those with kl <= budget; None if no point is within it."""
    allowed = np.flatnonzero(kl <= budget)
    return int(allowed[np.argmax(reward[allowed])]) if len(allowed) else None


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, resamples: int, seed: int, confidence: float = 0.95
) -> Interval:
    """Value of a statistic over prompts, with its percentile bootstrap interval.

    Args:
        statistic: row numbers of prompts, int [count] -> value. Resamples with value nan are left out.
        count: number of prompts.
        resamples: number of bootstrap resamples.
        seed: seed of the resamples; equal seeds draw equal rows.
        confidence: share of the resampled values inside the interval.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    tail = 50 * (1 - confidence)
    finite = np.array([v for v in values if np.isfinite(v)])
    low, high = np.percentile(finite, [tail, 100 - tail]) if len(finite) else (np.nan, np.nan)
    return Interval(float(statistic(np.arange(count))), float(low), float(high))


def compare_fronts(
    kl_a: np.ndarray,
    reward_a: np.ndarray,
    kl_b: np.ndarray,
    reward_b: np.ndarray,
    *,
    at: Sequence[float],
    resamples: int,
    seed: int,
) -> list[FrontComparison]:
    """Compare the rewards of two fronts, b minus a, at each KL in `at` (nats).

    Arrays are [K, N]: K policies of a front on the same N prompts. Prompts are resampled for both fronts together.
    """

    def difference(rows: np.ndarray, kl: float) -> float:
        values = [
            reward_at_kl(kls[:, rows].mean(1), rewards[:, rows].mean(1), kl)
            for kls, rewards in ((kl_a, reward_a), (kl_b, reward_b))
        ]
        return values[1] - values[0]

    count = kl_a.shape[1]
    return [
        FrontComparison(kl, bootstrap(functools.partial(difference, kl=kl), count, resamples=resamples, seed=seed))
        for kl in at
    ]


def reward_above(
    front_kl: np.ndarray, front_reward: np.ndarray, kl: np.ndarray, reward: np.ndarray, *, resamples: int, seed: int = 0
) -> Interval:
    """Front's reward at a policy's KL, minus the policy's reward. Front [K, N], policy [N], on the same N prompts."""

    def difference(rows: np.ndarray) -> float:
        means = front_kl[:, rows].mean(1), front_reward[:, rows].mean(1)
        return reward_at_kl(*means, kl[rows].mean()) - reward[rows].mean()

    return bootstrap(difference, len(kl), resamples=resamples, seed=seed)


def kl_saved(
    front_kl: np.ndarray, front_reward: np.ndarray, kl: np.ndarray, reward: np.ndarray, *, resamples: int, seed: int = 0
) -> Interval:
    """Share of a policy's KL that a front saves at equal reward (0.28 = 28 % less). Arrays as in `reward_above`."""

    def share(rows: np.ndarray) -> float:
        means = front_kl[:, rows].mean(1), front_reward[:, rows].mean(1)
        return 1 - kl_at_reward(*means, reward[rows].mean()) / kl[rows].mean()

    return bootstrap(share, len(kl), resamples=resamples, seed=seed)


def common_kls(
    kl_a: np.ndarray, reward_a: np.ndarray, kl_b: np.ndarray, reward_b: np.ndarray, count: int
) -> np.ndarray:
    """`count` evenly spaced KLs inside the range that two fronts of mean values [K] share; empty if they share none."""
    kl_a, kl_b = kl_a[non_dominated(kl_a, reward_a)], kl_b[non_dominated(kl_b, reward_b)]
    low, high = max(kl_a.min(), kl_b.min()), min(kl_a.max(), kl_b.max())
    return np.linspace(low, high, count + 2)[1:-1] if high > low else np.array([])


def _interpolate(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Interpolate y linearly at x = at; nan outside the range of x."""
    order = np.argsort(x)
    return float(np.interp(at, x[order], y[order], left=np.nan, right=np.nan))
