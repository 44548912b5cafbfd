"""Statistics over the completions of a policy: standard errors and bootstrap intervals over distinct prompts.

Completions of equal prompts are one *cluster*: they depend on each other, so resamples draw whole clusters. Axis
letters: N completions, G clusters, R resamples, L values whose intervals are wanted.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

CONFIDENCE = 0.95  # of all intervals
MIN_CLUSTERS = 6  # fewer give no bounds: percentile intervals of a mean hold in 91 % with 5 clusters, 75 % with 3
MIN_FINITE = 0.95  # share of finite resamples below which a value counts as not reached


class Interval(NamedTuple):
    """A value and the bounds of its confidence interval.

    All nan if the value is not reached. Only the bounds are nan if there are fewer than MIN_CLUSTERS clusters.
    """

    value: float
    low: float
    high: float


class Resamples(NamedTuple):
    """Bootstrap resamples of N completions."""

    counts: np.ndarray  # int [1 + R, N], how often each completion is drawn; row 0: once each, not resampled
    num_clusters: int

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means [..., 1 + R] of values [..., N]."""
        return np.asarray(values, np.float64) @ self.counts.T / self.counts.sum(1)


def resample(clusters: np.ndarray, count: int, seed: int) -> Resamples:
    """Draw `count` resamples of clusters with replacement. clusters: int [N], number of each completion's cluster."""
    names, numbers = np.unique(clusters, return_inverse=True)
    groups = len(names)
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=count)
    return Resamples(np.concatenate([np.ones((1, len(numbers)), int), drawn[:, numbers]]), groups)


def bootstrap(statistic: Callable[[np.ndarray], float], resamples: Resamples) -> Interval:
    """Value and percentile interval of any statistic of the drawn rows, int [about N] -> value.

    The bounds are nan if fewer than 95 % of the resamples have a finite value.
    """
    values = [statistic(np.repeat(np.arange(len(counts)), counts)) for counts in resamples.counts]
    return intervals(np.array([values]), resamples.num_clusters)[0]._replace(value=float(values[0]))


def mean_and_se(values: Sequence[float] | np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """Mean and its standard error, which is nan for fewer than 2 clusters (None: each value is a cluster).

    The standard error is the cluster-robust one, sqrt(G / (G - 1) * sum_g (sum of g's deviations)^2) / N. With one
    value per cluster this is the sample standard deviation / sqrt(N).
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    numbers = np.arange(len(array)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(numbers, array - mean)
    groups = len(sums)
    error = math.sqrt(groups / (groups - 1) * float(np.sum(sums**2))) / len(array) if groups > 1 else math.nan
    return mean, error


def intervals(values: np.ndarray, num_clusters: int) -> list[Interval]:
    """Percentile interval of each of L statistics alone. values: float64 [L, 1 + R], from `Resamples.means`.

    The percentiles are widened for few clusters (Hesterberg 2015, arXiv 1411.5279, section 5.4).
    """
    if num_clusters < MIN_CLUSTERS:
        return [Interval(float(row[0]), math.nan, math.nan) for row in values]
    tail = float(special.ndtr(-_widening(num_clusters) * special.ndtri((1 + CONFIDENCE) / 2)))
    found = []
    for row in values:
        resampled = row[1:][np.isfinite(row[1:])]
        if not np.isfinite(row[0]) or len(resampled) < MIN_FINITE * (len(row) - 1):
            found.append(Interval(math.nan, math.nan, math.nan))
        else:
            low, high = np.quantile(resampled, [tail, 1 - tail])
            found.append(Interval(float(row[0]), float(low), float(high)))
    return found


def simultaneous_intervals(values: np.ndarray, num_clusters: int) -> list[Interval]:
    """Intervals that contain all L values together in 95 % of cases, from the largest deviation of each resample.

    Arguments as in `intervals`. Each interval is value +- q * (bootstrap standard error), with one q for all.
    """
    pointwise = intervals(values, num_clusters)
    reached = np.array([math.isfinite(interval.low) for interval in pointwise], bool)
    if not reached.any():
        return pointwise
    resampled = values[reached, 1:]
    errors = np.nanstd(resampled, axis=1, ddof=1)
    deviations = np.abs(resampled - values[reached, :1]) / np.where(errors > 0, errors, 1)[:, None]
    largest = np.nanmax(deviations[:, np.isfinite(deviations).any(0)], axis=0)  # of resamples that reach a value
    width = np.zeros(len(values))
    width[reached] = _widening(num_clusters) * np.quantile(largest, CONFIDENCE) * errors
    return [Interval(p.value, p.value - w, p.value + w) for p, w in zip(pointwise, width.tolist(), strict=True)]


def half_width(num_clusters: int) -> float:
    """Half the width of the 95 % interval of a mean, in its standard errors (Student's t); nan for few clusters."""
    if num_clusters < MIN_CLUSTERS:
        return math.nan
    return float(special.stdtrit(num_clusters - 1, (1 + CONFIDENCE) / 2))


def ratio_and_se(parts: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Sum of `parts` over the sum of `sizes`, [R] each, and its standard error over the R rows."""
    ratio = float(np.sum(parts, dtype=np.float64) / np.sum(sizes))
    return ratio, mean_and_se((parts - ratio * sizes) / np.mean(sizes))[1]


def distinct_n(token_rows: Sequence[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among all n-grams of the rows, in [0, 1]; nan if the rows have no n-gram."""
    grams = [tuple(row[i : i + n]) for row in token_rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def _widening(num_clusters: int) -> float:
    """Factor on a normal interval of a bootstrap over few clusters: t quantile and unbiased variance."""
    upper = (1 + CONFIDENCE) / 2
    t = special.stdtrit(num_clusters - 1, upper) / special.ndtri(upper)
    return float(t * math.sqrt(num_clusters / (num_clusters - 1)))
