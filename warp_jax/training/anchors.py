"""The anchor that a policy is regularised towards: an average of the policy's weights (Algorithm 1, line 9)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from warp_jax import merging
from warp_jax.settings.groups import Bema, Warp
from warp_jax.types import Array, Params


class Anchor(NamedTuple):
    """A rule for the anchor. Its state is a pytree of float32 arrays, each with the shape of a trained weight."""

    init: Callable[[Params], Any]  # weights at the start of a run -> state
    weights: Callable[[Any], Params]  # state -> the anchor's weights
    update: Callable[[Any, Params, Array], Any]  # state, new policy, steps done (from 1) -> new state


def make_anchor(warp: Warp) -> Anchor:
    """The anchor of a config."""
    return bema(warp.bema, warp.anchor_every) if warp.anchor == "bema" else ema(warp.ema_rate, warp.anchor_every)


def ema(rate: float, every: int = 1) -> Anchor:
    """After every `every`-th step: anchor <- (1 - rate) anchor + rate policy.

    rate: mu, the weight of the policy. 0 keeps the start of the run; 1 replaces the anchor by the policy (resets of the
    reference, as in ProRL, arXiv 2505.24864).
    """

    def update(anchor: Params, policy: Params, steps: Array) -> Params:
        return merging.ema_update(anchor, policy, _if_due(rate, steps, every))

    return Anchor(_copy, lambda anchor: anchor, update)


def bema(settings: Bema, every: int = 1) -> Anchor:
    """BEMA, an average without its lag (arXiv 2508.00180). After step t, if t is a multiple of `every`:

    average <- (1 - b) average + b policy                   b = (lag + t) ** -ema_power
    anchor <- average + a (policy - start)                  a = (lag + t) ** -bias_power
    """

    def init(params: Params) -> dict[str, Params]:
        return {name: _copy(params) for name in ("anchor", "average", "start")}

    def update(state: dict[str, Params], policy: Params, steps: Array) -> dict[str, Params]:
        time = settings.lag + steps.astype(jnp.float32)
        average = merging.ema_update(state["average"], policy, _if_due(time**-settings.ema_power, steps, every))
        moved = jax.tree.map(
            lambda mean, new, old: mean + time**-settings.bias_power * (new - old), average, policy, state["start"]
        )
        anchor = merging.ema_update(state["anchor"], moved, _if_due(1.0, steps, every))
        return {"anchor": anchor, "average": average, "start": state["start"]}

    return Anchor(init, lambda state: state["anchor"], update)


def _if_due(rate: float | Array, steps: Array, every: int) -> float | Array:
    """The rate after every `every`-th step, 0 after the others."""
    return rate if every == 1 else jnp.where(steps % every == 0, rate, 0.0)


def _copy(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
