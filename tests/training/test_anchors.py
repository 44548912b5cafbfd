"""The anchors against their closed forms, in float64, over a path of policies that is no line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.training import anchors

STEPS = 7
START = np.array([0.4, -1.3])
PATH = START + np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 2)), axis=0)  # the policy after each step


def _follow(changes):
    """The anchor's weights after each step."""
    anchor = anchors.make_anchor(settings_of(changes).warp)
    state, found = anchor.init({"w": jnp.asarray(START, jnp.bfloat16)}), []
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    state = anchor.init({"w": jnp.asarray(START, jnp.float32)})
    for step, policy in enumerate(PATH, start=1):
        state = jax.jit(anchor.update)(state, {"w": jnp.asarray(policy, jnp.float32)}, jnp.int32(step))
        found.append(np.asarray(anchor.weights(state)["w"]))
    return np.array(found)


def _average(rate, every):
    """(1 - rate)^n start + rate sum_i (1 - rate)^(n - i) policy_i, over the n policies that were averaged."""
    found = []
    for step in range(1, STEPS + 1):
        seen = PATH[every - 1 : step : every]
        shares = rate * (1 - rate) ** np.arange(len(seen))[::-1]
        found.append((1 - rate) ** len(seen) * START + shares @ seen)
    return np.array(found)


@pytest.mark.parametrize(("rate", "every"), [(0.2, 1), (0.2, 3), (0.0, 1), (1.0, 2), (0.03, 2)])
def test_the_average_of_every_few_steps(rate, every):
    """Fails when the rate weighs the anchor, steps are counted from 0, or the anchor moves between the steps."""
    found = _follow({"warp.ema_rate": rate, "warp.anchor_every": every})
    np.testing.assert_allclose(found, _average(rate, every), rtol=2e-6)
    if rate == 1.0:
        np.testing.assert_array_equal(found[1::2], PATH[1::2].astype(np.float32))


@pytest.mark.parametrize("every", [1, 3])
def test_bema_by_hand(every):
    """Fails when a power or the lag is dropped, the two powers are exchanged, the correction starts from the average,
    or the anchor moves between the steps.
    """
    average, want, kept = START.copy(), [], START.copy()
    for step, policy in enumerate(PATH, start=1):
        if step % every == 0:
            rate, bias = (3.0 + step) ** -0.7, (3.0 + step) ** -0.3
            average = (1 - rate) * average + rate * policy
            kept = average + bias * (policy - START)
        want.append(kept)
    bema = {"warp.bema.ema_power": 0.7, "warp.bema.bias_power": 0.3, "warp.bema.lag": 3.0}
    found = _follow({"warp.anchor": "bema", "warp.anchor_every": every, **bema})
    np.testing.assert_allclose(found, want, rtol=3e-6)
