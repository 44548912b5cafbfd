"""Stochastic rounding and delivered shares against independent float64 arithmetic."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from warp_jax.merging import rounding

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_stochastic_rounding_takes_the_neighbours_with_the_right_probability(library, dtype, share):
    """Mutation: the probability reversed; the neighbour on the wrong side; a fixed distance between neighbours; a step
    towards infinity, which float8_e4m3fn does not have.
    """
    dtype = np.dtype(dtype)
    low = np.array([0.75, -1.5, 1.0, 2.0**-20, -3.0, 96.0], dtype)
    high = np.nextafter(low, np.array(ml_dtypes.finfo(dtype).max, dtype)).astype(np.float64)
    x = low.astype(np.float64) + share * (high - low.astype(np.float64))
    draws = 4000
    uniforms = np.random.default_rng(0).random((draws, 6))
    with jax.enable_x64(True):
        rounded = rounding.stochastic(library.asarray(np.tile(x, (draws, 1))), dtype, library.asarray(uniforms))
        rounded = np.asarray(rounded)
    assert rounded.dtype == dtype
    went_up = rounded.astype(np.float64) == high
    assert (went_up | (rounded == low)).all()
    assert went_up.mean(0) == pytest.approx(np.full(6, share), abs=4 * np.sqrt(share * (1 - share) / draws))


def test_what_the_dtype_contains_is_kept():
    """Mutation: `<=` in place of `<` with a uniform of 0; infinity or NaN moved."""
    x = np.array([0.0, 1.0, -0.375, 2.0**-130, 1e39, -np.inf, np.nan])
    got = rounding.stochastic(x, BF16, np.zeros(7))
    with np.errstate(over="ignore"):
        want = x.astype(BF16)
    assert np.array_equal(got, want, equal_nan=True)


def test_uniforms_do_not_depend_on_the_cut():
    """Mutation: the offset inside a count of Philox is lost."""
    whole = rounding.uniforms("layers.0.up", 0, 1000, 3)
    for start in (0, 1, 2, 3, 4, 517):
        assert np.array_equal(rounding.uniforms("layers.0.up", start, 300, 3), whole[start : start + 300])
    assert abs(whole.mean() - 0.5) < 0.04
    assert (np.diff(np.sort(whole)) > 0).all()


def test_uniforms_differ_by_name_and_seed():
    """Mutation: name or seed not in the key."""
    first = rounding.uniforms("a", 0, 8, 0)
    assert not np.isin(rounding.uniforms("b", 0, 8, 0), first).any()
    assert not np.isin(rounding.uniforms("a", 0, 8, 1), first).any()


def test_delivery_by_hand():
    """Mutation: the norm of the written displacement in place of the projection; the error not relative to asked."""
    found = rounding.measure(np.array([3.0, 4.0]), np.array([0.0, 5.0]))  # 20 of 25; error (-3, 1)
    assert found.share == pytest.approx(0.8)
    assert found.relative_error == pytest.approx(np.sqrt(10) / 5)
