"""LITI rates that grow with depth (LiNeS), against hand arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax import merging
from warp_jax.merging import units

NAMES = ["embed", "layers/0", "layers/1", "layers/2", "layers/3/attn/q", "norm"]


def test_shares_by_hand():
    """Fails when alpha is the share of the last layer, L - 1 is L, or a unit outside layers takes the whole rate."""
    np.testing.assert_allclose(units.depth_shares(NAMES, 0.1), [0.1, 0.1, 0.4, 0.7, 1.0, 0.1], rtol=1e-12)
    np.testing.assert_array_equal(units.depth_shares(["model.layers.0"], 0.1), [0.1])
    np.testing.assert_allclose(units.depth_shares(["h.2", "h.0"], 0.5), [1.0, 0.5], rtol=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha):
    """Fails when a percentage is taken for a share."""
    with pytest.raises(ValueError, match="want a number from 0 to 1"):
        units.depth_shares(NAMES, alpha)


def test_units_without_layers_are_refused():
    """Fails when every unit takes alpha in silence."""
    with pytest.raises(ValueError, match="no layer in the names of the units"):
        units.depth_shares(["model"], 0.5)


def _trees():
    """Init, and two policies whose task vectors are at 90 degrees in every unit; layers 0 to 2 stacked."""
    init = {"embed": jnp.array([1.0, -1]), "layers": {"w": jnp.array([[0.5, 2], [3, 0.25], [-1, 4]])}}
    first = {"embed": jnp.array([2.0, 0]), "layers": {"w": jnp.array([[1.0, 0], [2, 0], [4, 0]])}}
    second = {"embed": jnp.array([0, 1.0]), "layers": {"w": jnp.array([[0, 1.0], [0, 3], [0, 1]])}}
    return init, [jax.tree.map(jnp.add, init, moved) for moved in (first, second)]


RATES = {"embed": 0.06, "layers": [[0.06], [0.18], [0.3]]}  # 0.3 * (0.2, 0.2, 0.6, 1.0)
# each method's coefficients at 90 degrees, with the given weights
METHODS = {"slerp": (None, (0.5**0.5, 0.5**0.5)), "lerp": ([0.2, 0.7], (0.2, 0.7)), "model_stock": (None, (0, 0))}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_jit", [False, True])
def test_each_layer_takes_its_rate(method, in_jit):
    """Fails when all units take one rate (as lerp did), the rates are of other units, or the rate scales init too."""
    weights, by_policy = METHODS[method]
    init, policies = _trees()

    def merge(rate):
        return merging.merge(init, policies, method, weights=weights, liti_rate=merging.lines(rate, alpha=0.2))

    found = jax.jit(merge)(jnp.float32(0.3)) if in_jit else merge(0.3)
    deltas = [jax.tree.map(lambda p, i: np.asarray(p, np.float64) - np.asarray(i), p, init) for p in policies]
    for name, rate, got, start, one, two in [
        ("embed", RATES["embed"], found["embed"], init["embed"], deltas[0]["embed"], deltas[1]["embed"]),
        ("layers", RATES["layers"], *(tree["layers"]["w"] for tree in (found, init, *deltas))),
    ]:
        want = start + np.multiply(rate, by_policy[0] * one + by_policy[1] * two)
        np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=name)


def test_liti_and_full_weights_take_rates_too():
    """Fails when `liti` turns the function into a number, or the share of init is not scaled with its unit."""
    init, policies = _trees()
    rate = merging.lines(0.3, alpha=0.2)
    for method in ("slerp", "slerp_full_weights"):
        merged = merging.merge(init, policies, method)
        found = merging.merge(init, policies, method, liti_rate=rate)
        for tree in (found, merging.liti(init, merged, rate)):
            want = jax.tree.map(
                lambda i, m, r: i + np.asarray(r, np.float32) * (m - i),
                *({"embed": t["embed"], "layers": t["layers"]["w"]} for t in (init, merged)),
                {"embed": np.float32(RATES["embed"]), "layers": np.float32(RATES["layers"])},
            )
            np.testing.assert_allclose(tree["embed"], want["embed"], rtol=1e-5)
            np.testing.assert_allclose(tree["layers"]["w"], want["layers"], rtol=1e-5)


def test_any_function_of_the_names_sets_the_rates():
    """Fails when rates are taken in another order than that of `gram`."""
    init, policies = _trees()
    found = merging.lerp(
        init, policies, liti_rate=lambda names: np.array([name == "layers/1" for name in names], float)
    )
    np.testing.assert_array_equal(found["embed"], init["embed"])
    np.testing.assert_array_equal(found["layers"]["w"][0], init["layers"]["w"][0])
    np.testing.assert_allclose(found["layers"]["w"][1], [4, 1.75])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["numpy", "jax", "function of a list"])
def test_rates_may_be_given_without_a_function(method, kind):
    """Fails when LERP takes the first rate for all units in silence, or a function must return an array."""
    init, policies = _trees()
    rates = [0.06, 0.06, 0.18, 0.3]
    given = {"numpy": np.array(rates), "jax": jnp.array(rates), "function of a list": lambda names: rates}[kind]
    found, want = (merging.merge(init, policies, method, liti_rate=r) for r in (given, merging.lines(0.3, alpha=0.2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [[0.1, 0.2], [[0.1] * 4], lambda names: [0.3]], ids=["few", "table", "function"])
def test_other_numbers_of_rates_are_refused(method, rate):
    """Fails when rates are broadcast over the units, or end in an IndexError."""
    init, policies = _trees()
    with pytest.raises(ValueError, match=r"^liti_rate: got shape .*, want a number, or one for each of the 4 units \("):
        merging.merge(init, policies, method, liti_rate=rate if callable(rate) else np.array(rate))
