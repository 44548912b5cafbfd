"""Statistics over the completions of one policy."""

import math
from collections.abc import Sequence

import numpy as np


def mean_and_se(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error: sample standard deviation / sqrt(N), or nan for fewer than 2 values."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    return float(array.mean()), error


def distinct_n(token_rows: Sequence[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among all n-grams of the rows, in [0, 1]; nan if the rows have no n-gram."""
    grams = [tuple(row[i : i + n]) for row in token_rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
