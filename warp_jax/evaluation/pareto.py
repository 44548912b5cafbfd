"""Comparing policies in the plane of KL (lower is better) and reward (higher is better)."""

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
    """Reward of front b minus reward of front a at one KL (nats), with its interval."""

    kl: float
    difference: Interval


def non_dominated(kl: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Bool [K]: True where no other point has both less (or equal) KL and more (or equal) reward, one strictly."""
    no_worse = (kl[None, :] <= kl[:, None]) & (reward[None, :] >= reward[:, None])
    better = (kl[None, :] < kl[:, None]) | (reward[None, :] > reward[:, None])
    return ~np.any(no_worse & better, axis=1)


def reward_at_kl(kl: np.ndarray, reward: np.ndarray, at: float) -> float:
    """Reward of the front of the points (kl [K], reward [K]) at one KL, linear between neighbours; nan outside."""
    front = non_dominated(kl, reward)
    return _interpolate(kl[front], reward[front], at)


def kl_at_reward(kl: np.ndarray, reward: np.ndarray, at: float) -> float:
    """The KL at which the front of the points reaches one reward: the inverse of `reward_at_kl`; nan outside."""
    front = non_dominated(kl, reward)
    return _interpolate(reward[front], kl[front], at)


def best_under_budget(kl: np.ndarray, reward: np.ndarray, budget: float) -> int | None:
    """Index of the highest reward among points with kl <= budget; None if there is none."""
    allowed = np.flatnonzero(kl <= budget)
    return int(allowed[np.argmax(reward[allowed])]) if len(allowed) else None


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, resamples: int, seed: int, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap of statistic(rows) over `count` prompts. Resamples where it is nan are left out."""
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
    """Front b minus front a at each KL. Arrays [K, N]: K policies of a front on the same N prompts, kept paired."""

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
    """Reward of a front at a policy's KL, minus the policy's. front_* [K, N] and kl, reward [N], prompts paired."""

    def difference(rows: np.ndarray) -> float:
        means = front_kl[:, rows].mean(1), front_reward[:, rows].mean(1)
        return reward_at_kl(*means, kl[rows].mean()) - reward[rows].mean()

    return bootstrap(difference, len(kl), resamples=resamples, seed=seed)


def kl_saved(
    front_kl: np.ndarray, front_reward: np.ndarray, kl: np.ndarray, reward: np.ndarray, *, resamples: int, seed: int = 0
) -> Interval:
    """Share of a policy's KL that a front saves at the same reward, 0.28 = 28 % less. Arrays as in `reward_above`."""

    def share(rows: np.ndarray) -> float:
        means = front_kl[:, rows].mean(1), front_reward[:, rows].mean(1)
        return 1 - kl_at_reward(*means, reward[rows].mean()) / kl[rows].mean()

    return bootstrap(share, len(kl), resamples=resamples, seed=seed)


def common_kls(
    kl_a: np.ndarray, reward_a: np.ndarray, kl_b: np.ndarray, reward_b: np.ndarray, count: int
) -> np.ndarray:
    """`count` KLs strictly inside the range that two fronts (means of each policy, [K]) share; empty if none."""
    kl_a, kl_b = kl_a[non_dominated(kl_a, reward_a)], kl_b[non_dominated(kl_b, reward_b)]
    low, high = max(kl_a.min(), kl_b.min()), min(kl_a.max(), kl_b.max())
    return np.linspace(low, high, count + 2)[1:-1] if high > low else np.array([])


def _interpolate(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Linear between the points, in order of x; nan outside."""
    order = np.argsort(x)
    return float(np.interp(at, x[order], y[order], left=np.nan, right=np.nan))
