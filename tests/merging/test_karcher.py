"""The Karcher mean against explicit logarithms and exponentials of vectors in float64, and the order of `slerp`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax import merging
from warp_jax.merging import coefficients, sphere

LENGTHS = np.array([3.0, 0.7, 1.9, 0.2, 1.1, 2.5, 0.9, 1.4])
WEIGHTS = np.array([0.1, 0.25, 0.3, 0.15, 0.2])


def _vectors(count, *, common=0.5, seed=0):
    """Task vectors [M, 40] of unequal lengths that lean on a common direction."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 40)) + common * rng.normal(size=40)
    return LENGTHS[:count, None] * rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _gram(*units):
    return np.stack([rows @ rows.T for rows in map(np.asarray, units)]).astype(np.float64)


def _log(point, direction):
    """Tangent at a point of the sphere whose geodesic reaches `direction` at time 1."""
    tangent = direction - (direction @ point) * point
    length = np.linalg.norm(tangent)
    return np.arctan2(length, direction @ point) * tangent / length if length else tangent


def _exp(point, tangent):
    length = np.linalg.norm(tangent)
    return np.cos(length) * point + np.sin(length) * tangent / length if length else point


def _exact_mean(rows, weights):
    """Descend along the mean of the logarithms until it vanishes."""
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    point = directions[0]
    for _ in range(2000):
        step = sum(w * _log(point, u) for w, u in zip(weights, directions, strict=True))
        point = _exp(point, step)
        point /= np.linalg.norm(point)
    return point


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_five_policies_against_logarithms_on_vectors(weights):
    """Fails when weights are not used, an angle is left out of the pull, or lengths change the mean direction."""
    rows = _vectors(5)
    found = coefficients.karcher_coefficients(_gram(rows, rows[::-1]), weights)
    for number, (unit, of_unit) in enumerate(zip((rows, rows[::-1]), found, strict=True)):
        directions = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        shares = np.full(5, 0.2) if weights is None else weights
        want = _exact_mean(unit, shares)
        np.testing.assert_allclose(of_unit @ directions, want, rtol=0, atol=1e-12, err_msg=str(number))
        residual = sum(w * _log(of_unit @ directions, u) for w, u in zip(shares, directions, strict=True))
        assert np.linalg.norm(residual) < 1e-10


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("common", [0, 0.3, 3])
def test_the_residual_vanishes(count, common):
    """Fails when the search ends after one step."""
    rows = _vectors(count, common=common, seed=count)
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    point = coefficients.karcher_coefficients(_gram(rows))[0] @ directions
    assert np.linalg.norm(point) == pytest.approx(1, abs=1e-12)
    assert np.linalg.norm(sum(_log(point, u) for u in directions) / count) < 1e-10


@pytest.mark.parametrize("weight", [0.5, 0.2, 0.9])
@pytest.mark.parametrize("degrees", [0, 1e-5, 1, 30, 90, 150, 179])
def test_two_policies_are_slerp(weight, degrees):
    """Fails when the mixture is of normalised task vectors, or the weight counts from the wrong end."""
    angle = np.radians(degrees)
    first, second = np.array([3.0, 0]), 0.7 * np.array([np.cos(angle), np.sin(angle)])
    sine = np.sin(angle) if degrees else 1.0
    want = [np.sin((1 - weight) * angle) / sine, np.sin(weight * angle) / sine] if degrees else [1 - weight, weight]
    matrix, weights = _gram([first, second]), np.array([1 - weight, weight])
    by_gram = 1e-12 if degrees <= 150 else 1e-8  # the rounding of the Gram matrix counts here
    found = coefficients.karcher_coefficients(matrix, weights)
    np.testing.assert_allclose(found[0], want, rtol=0, atol=by_gram)
    np.testing.assert_allclose(found, coefficients.slerp_coefficients(matrix, [weight]), rtol=0, atol=1e-12)
    cosines = _gram([first / 3, second / 0.7])
    np.testing.assert_allclose(sphere.mean(cosines, weights[None])[0], want, rtol=0, atol=by_gram)


def test_the_order_of_five_policies_does_not_matter():
    """Fails when the search starts at one of the policies and stops early."""
    rows = _vectors(5)
    given = coefficients.karcher_coefficients(_gram(rows), WEIGHTS)[0]
    for order in itertools.permutations(range(5)):
        found = coefficients.karcher_coefficients(_gram(rows[list(order)]), WEIGHTS[list(order)])[0]
        np.testing.assert_allclose(found, given[list(order)], rtol=0, atol=1e-13)


def test_equal_lengths_are_kept():
    """Fails when the coefficients add up to 1, as those of LERP."""
    rows = _vectors(6, common=0) / LENGTHS[:6, None] * 1.7
    merged = coefficients.karcher_coefficients(_gram(rows))[0] @ rows
    assert np.linalg.norm(merged) == pytest.approx(1.7, rel=1e-12)


def test_zero_and_parallel_task_vectors_are_averaged():
    """Fails when a zero length, or a zero angle, divides by zero; or a zero vector takes no share."""
    units = [[0, 0], [0, 0], [0, 0]], [[2, 1], [4, 2], [1, 0.5]], [[0, 0], [3, 1], [0, 0]]
    for weights in (None, [0.2, 0.7, 0.1]):
        found = coefficients.karcher_coefficients(_gram(*units), weights)
        np.testing.assert_allclose(found, [weights or [1 / 3] * 3] * 3, rtol=0, atol=1e-12)
    close = np.array([[1, 0, 0], [1, 1e-7, 0], [1, 0, 1e-7]])
    np.testing.assert_allclose(
        coefficients.karcher_coefficients(_gram(close), [0.2, 0.7, 0.1])[0], [0.2, 0.7, 0.1], atol=1e-12
    )


def test_a_zero_task_vector_counts_as_parallel_to_the_mean():
    """Fails when its weight is given to the others."""
    rows = np.array([[0, 0, 0], [1, 2, 0], [0, 1, -1]], float)
    mean = _exact_mean(rows[1:], [0.7 / 0.8, 0.1 / 0.8])
    want = coefficients.karcher_coefficients(_gram([1e-3 * mean, *rows[1:]]), [0.2, 0.7, 0.1])
    np.testing.assert_allclose(
        coefficients.karcher_coefficients(_gram(rows), [0.2, 0.7, 0.1]), want, rtol=0, atol=1e-10
    )


UNDEFINED = {
    "cancel": [[1, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]],
    "opposite": [[1, 0.5, 0], [2, 1, 0], [-3, -1.5, 0]],
    "opposite and zero": [[1, 0, 0], [0, 0, 0], [-0.5, 0, 0]],
    "nearly opposite": [[1, 0, 0], [1, 1e-9, 0], [-1, 0, 1e-9]],
}


@pytest.mark.parametrize("kind", UNDEFINED)
@pytest.mark.parametrize("in_jit", [False, True])
def test_task_vectors_without_a_mean_give_nan(kind, in_jit):
    """Fails when some point of the sphere is returned as their mean, or its neighbours become NaN too."""
    ordinary = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    matrix = _gram(UNDEFINED[kind], ordinary)
    with jax.enable_x64(True):
        solve = jax.jit(coefficients.karcher_coefficients) if in_jit else coefficients.karcher_coefficients
        found = np.asarray(solve(jnp.asarray(matrix) if in_jit else matrix))
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], 3**-0.5, rtol=1e-12)


def test_the_error_says_that_task_vectors_cancel():
    """Fails when three directions without a mean, of which no two are opposite, are called opposite or not finite."""
    init, policies = {"w": jnp.zeros(3)}, [{"w": jnp.array(row, jnp.float32)} for row in UNDEFINED["cancel"]]
    with pytest.raises(ValueError, match=r"opposite or cancel out in w, where karcher has no result; leave out a pol"):
        merging.karcher(init, policies)


def test_directions_that_cancel_in_many_dimensions_give_nan():
    """Fails when rounding makes a singular Hessian, whose error names no unit, or a mean of the sum's rounding."""
    for count in range(3, 8):
        simplex = np.eye(count) - 1 / count
        rotations = [np.linalg.qr(np.random.default_rng(s).normal(size=(40, count)))[0].T for s in range(40)]
        assert np.isnan(coefficients.karcher_coefficients(_gram(*(simplex @ r for r in rotations)))).all()


def test_a_search_that_does_not_converge_gives_nan(monkeypatch):
    """Fails when the last point of the search is returned as the mean."""
    monkeypatch.setattr(sphere, "STEPS", 1)
    assert np.isnan(coefficients.karcher_coefficients(_gram(_vectors(5)), WEIGHTS)).all()


def test_jit_and_numpy_agree():
    """Fails when the loop inside jit takes other steps."""
    matrix = _gram(*(_vectors(5, common=c, seed=s) for s, c in enumerate((0, 0.2, 1, 5))))
    with jax.enable_x64(True):
        found = jax.jit(lambda m: coefficients.karcher_coefficients(m, WEIGHTS))(jnp.asarray(matrix))
    np.testing.assert_allclose(found, coefficients.karcher_coefficients(matrix, WEIGHTS), rtol=0, atol=1e-13)


def test_a_tree_is_merged_by_layer():
    """Fails when one mean is taken of the whole tree, or the weights are not passed on."""
    init = {"layers/0/a": jnp.ones(20), "layers/0/b": jnp.ones(20), "norm": jnp.ones(40)}
    rows, others = _vectors(5), _vectors(5, seed=1)
    policies = [
        {"layers/0/a": 1 + a[:20], "layers/0/b": 1 + a[20:], "norm": 1 + b} for a, b in zip(rows, others, strict=True)
    ]
    merged = merging.karcher(init, [jax.tree.map(jnp.float32, p) for p in policies], WEIGHTS, liti_rate=0.3)
    for unit, leaves in ((rows, ("layers/0/a", "layers/0/b")), (others, ("norm",))):
        directions = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        solved = np.linalg.lstsq(directions.T, _exact_mean(unit, WEIGHTS))[0]
        np.testing.assert_allclose(
            np.concatenate([merged[leaf] for leaf in leaves]), 1 + 0.3 * solved @ unit, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.6], [-0.2, 0.6, 0.6], [float("nan"), 0.5, 0.5]])
def test_weights_that_are_no_shares_are_refused(weights):
    """Fails when weights are normalised in silence, or negative ones are taken."""
    with pytest.raises(ValueError, match="want numbers from 0 to 1 that add up to 1 for karcher"):
        coefficients.karcher_coefficients(_gram(_vectors(3)), weights)
    with pytest.raises(ValueError, match="weights: got 3 for 5 policies, want 5: one each"):
        coefficients.karcher_coefficients(_gram(_vectors(5)), weights)


# ---------------------------------------------------------------- the order of slerp


def _recursion(rows):
    """Eq. 26 on vectors."""
    total = rows[0]
    for m, row in enumerate(rows[1:], start=2):
        angle = np.arccos(total @ row / np.linalg.norm(total) / np.linalg.norm(row))
        total = (np.sin((1 - 1 / m) * angle) * total + np.sin(angle / m) * row) / np.sin(angle)
    return total


@pytest.mark.parametrize("count", [3, 4, 5])
def test_the_spread_over_orders_is_that_of_the_merged_vectors(count):
    """Fails when coefficients are not put back in place, or distances are not relative to the merge."""
    rows = _vectors(count, common=0)
    cyclic = [np.roll(range(count), shift) for shift in range(count)]
    orders = itertools.permutations(range(count)) if count < 5 else cyclic
    given = _recursion(rows)
    want = max(np.linalg.norm(_recursion(rows[list(order)]) - given) for order in orders) / np.linalg.norm(given)
    found = coefficients.order_spread(_gram(rows, np.zeros_like(rows), rows * 7))
    assert want > 0.01
    np.testing.assert_allclose(found, [want, 0, want], rtol=1e-9)


def test_orders_without_a_merge_are_left_out_of_the_spread():
    """Fails when one opposite pair in some order makes the spread NaN."""
    assert np.isfinite(coefficients.order_spread(_gram([[1, 0], [0, 1], [-1, 0]]))).all()
