"""Fronts of reward (higher is better) against KL (lower is better), with intervals over prompts.

A front is the curve eta -> (KL, reward) of one merge, measured at K etas in rising order. Between two etas it is
interpolated linearly. All K points count: to keep only the non-dominated ones would let noise choose, and favour the
front with more points (docs/results/front_statistics.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from warp_jax.evaluation import statistics
from warp_jax.evaluation.statistics import Interval

AREA_POINTS = 100  # values of x for an area


class Measured(NamedTuple):
    """K policies on the same N completions of prompts. A front has its K etas in rising order."""

    kl: np.ndarray  # [K, N], nats to SFT
    reward: np.ndarray  # [K, N]


class Look(NamedTuple):
    """Reward of front b minus reward of front a at one KL (nats)."""

    kl: float
    difference: Interval  # 95 % interval for this KL alone
    simultaneous: Interval  # 95 % interval that holds for all compared KLs together


class Choice(NamedTuple):
    """A point chosen on one half of the prompts, and measured on the other half."""

    point: int  # number of the chosen policy, from 0
    kl: float
    reward: float
    probability: float  # share of resamples of the other half whose mean KL is within the budget


def along_curve(x: np.ndarray, y: np.ndarray, at: np.ndarray | float) -> np.ndarray:
    """Return y where a curve of K points first reaches x = at, linear between neighbours; nan if it never does.

    x, y: [K, ...], in the order of the curve; at: number or [...].
    """
    inside = (np.minimum(x[:-1], x[1:]) <= at) & (at <= np.maximum(x[:-1], x[1:]))
    first = inside.argmax(0)[None]
    x0, x1, y0, y1 = (np.take_along_axis(a, first, 0)[0] for a in (x[:-1], x[1:], y[:-1], y[1:]))
    share = np.where(x1 != x0, (at - x0) / np.where(x1 != x0, x1 - x0, 1), 0)
    return np.where(inside.any(0), y0 + share * (y1 - y0), np.nan)


def area(x: np.ndarray, y: np.ndarray, end: float) -> np.ndarray:
    """Area between a curve of K points and its height at the start, from there to x = end; nan if it ends before.

    x, y: [K, ...] as in `along_curve` -> [...]. Trapezoids between AREA_POINTS values of x.
    """
    at = np.linspace(x[0], np.broadcast_to(end, x[0].shape), AREA_POINTS)
    return np.trapezoid(np.stack([along_curve(x, y, place) for place in at]) - y[0], at, axis=0)


def compare_fronts(
    front_a: Measured, front_b: Measured, at: Sequence[float], resamples: statistics.Resamples
) -> list[Look]:
    """Compare the rewards of two fronts on the same prompts, b minus a, at each KL in `at` (nats)."""
    (kl_a, reward_a), (kl_b, reward_b) = (map(resamples.means, front) for front in (front_a, front_b))
    differences = [along_curve(kl_b, reward_b, kl) - along_curve(kl_a, reward_a, kl) for kl in at]
    values = np.array(differences).reshape(len(at), len(resamples.counts))  # also for no KL at all
    alone = statistics.intervals(values, resamples.num_clusters)
    together = statistics.simultaneous_intervals(values, resamples.num_clusters)
    return [Look(*look) for look in zip(at, alone, together, strict=True)]


class Against(NamedTuple):
    """Comparison of a front with one policy."""

    reward_above: Interval  # front's reward at the policy's KL, minus the policy's reward
    kl_saved: Interval  # share of the policy's KL that the front saves at equal reward (0.28 = 28 % less)


def compare_with_policies(front: Measured, policies: Measured, resamples: statistics.Resamples) -> list[Against]:
    """Compare a front with each of K policies, on the same prompts."""
    (front_kl, front_reward), (kls, rewards) = (map(resamples.means, measured) for measured in (front, policies))
    found = []
    for kl, reward in zip(kls, rewards, strict=True):
        above = along_curve(front_kl, front_reward, kl) - reward
        saved = 1 - along_curve(front_reward, front_kl, reward) / np.where(kl != 0, kl, np.nan)
        found.append(Against(*statistics.intervals(np.stack([above, saved]), resamples.num_clusters)))
    return found


def choose_under_budgets(
    front: Measured, clusters: np.ndarray, budgets: Sequence[float], *, resamples: int, seed: int
) -> list[Choice | None]:
    """For each budget (nats), choose the point with the highest reward and a mean KL within it, on half of the prompts.

    The half is random. KL and reward are measured on the other one: on the half that chose, the reward is biased
    upwards and the KL downwards. None if no point is within the budget, or all prompts are equal.
    """
    groups, numbers = np.unique(clusters, return_inverse=True)
    if len(groups) < 2:
        return [None] * len(budgets)
    chooses = np.random.default_rng(seed).permutation(len(groups))[numbers] < len(groups) // 2
    kl, reward = (values[:, chooses].mean(1) for values in front)
    drawn = statistics.resample(clusters[~chooses], resamples, seed)
    kls, rewards = (drawn.means(values[:, ~chooses]) for values in front)
    choices: list[Choice | None] = []
    for budget in budgets:
        allowed = np.flatnonzero(kl <= budget)
        if not len(allowed):
            choices.append(None)
            continue
        best = int(allowed[np.argmax(reward[allowed])])
        kept = float(np.mean(kls[best, 1:] <= budget))
        choices.append(Choice(best, float(kls[best, 0]), float(rewards[best, 0]), kept))
    return choices


def common_kls(kl_a: np.ndarray, kl_b: np.ndarray, count: int) -> np.ndarray:
    """`count` evenly spaced KLs inside the range that two fronts of mean KLs [K] share; empty if they share none."""
    low, high = max(kl_a.min(), kl_b.min()), min(kl_a.max(), kl_b.max())
    return np.linspace(low, high, count + 2)[1:-1] if high > low else np.array([])
