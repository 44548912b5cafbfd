"""Mean, standard error and distinct n-grams against hand arithmetic."""

import math

import numpy as np
import pytest

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
