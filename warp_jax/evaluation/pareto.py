"""Comparing policies by their KL (lower is better) and their reward (higher is better)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

TAIL = 50 * (1 - 0.95)  # percent of the resampled values on each side of an interval


class Interval(NamedTuple):
    """A value and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


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


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, *, resamples: int, seed: int) -> Interval:
    """Value of a statistic over `count` prompts, with its percentile bootstrap interval.

    statistic: row numbers of prompts, int [count] -> value. Resamples with value nan are left out; equal seeds draw
    equal rows.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    finite = np.array([v for v in values if np.isfinite(v)])
    low, high = np.percentile(finite, [TAIL, 100 - TAIL]) if len(finite) else (np.nan, np.nan)
    return Interval(float(statistic(np.arange(count))), float(low), float(high))


def bootstrap_means(
    statistic: Callable[..., float], measured: Sequence[np.ndarray], *, resamples: int, seed: int
) -> Interval:
    """`bootstrap` of a statistic of means over prompts, which are the last axis, N, of each array."""

    def of_rows(rows: np.ndarray) -> float:
        return statistic(*(values[..., rows].mean(-1) for values in measured))

    return bootstrap(of_rows, measured[0].shape[-1], resamples=resamples, seed=seed)


def reward_gained(kl_a: np.ndarray, reward_a: np.ndarray, kl_b: np.ndarray, reward_b: np.ndarray, at: float) -> float:
    """Reward of front b minus reward of front a at one KL (nats)."""
    return reward_at_kl(kl_b, reward_b, at) - reward_at_kl(kl_a, reward_a, at)


def reward_above(front_kl: np.ndarray, front_reward: np.ndarray, kl: float, reward: float) -> float:
    """Front's reward at a policy's KL, minus the policy's reward."""
    return reward_at_kl(front_kl, front_reward, kl) - reward


def kl_saved(front_kl: np.ndarray, front_reward: np.ndarray, kl: float, reward: float) -> float:
    """Share of a policy's KL that a front saves at equal reward (0.28 = 28 % less)."""
    return 1 - kl_at_reward(front_kl, front_reward, reward) / kl


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
