"""Merging pytrees in memory; the public names, with their options and errors, are those of `warp_jax.merging`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from warp_jax import trees
from warp_jax.merging import kernels, leaf_units, units
from warp_jax.merging.coefficients import FULL_WEIGHTS, METHODS, solve, with_liti
from warp_jax.types import Array, HostOrDevice, Params


class Gram(NamedTuple):
    """Inner products of M task vectors. matrix: float64 [U, M, M], numpy unless traced; names: of the U units."""

    matrix: HostOrDevice
    names: tuple[str, ...]


def task_vector(params: Params, init_params: Params) -> Params:
    """Params - init_params in float32, leaf by leaf (the paper's delta)."""
    trees.check_same_structure(init_params, params, "params")
    return jax.tree.map(lambda new, init: _f32(new) - _f32(init), params, init_params)


def ema_update(anchor_params: Params, params: Params, ema_rate: float | Array) -> Params:
    """(1 - ema_rate) * anchor + ema_rate * params: `ema_rate` weighs the NEW weights (Algorithm 1, line 9).

    Keep the anchor in float32: at rate 0.01 a bfloat16 anchor never moves. 0 freezes it, 1 copies params.
    """

    def update(anchor: Array, new: Array) -> Array:
        mixed = (1 - ema_rate) * _f32(anchor) + ema_rate * _f32(new)
        return mixed.astype(anchor.dtype)

    return jax.tree.map(update, anchor_params, params)


def liti(init_params: Params, merged_params: Params, liti_rate: float | Array) -> Params:
    """(1 - liti_rate) * init + liti_rate * merged (Algorithm 1, line 13): 0 gives init, 1 merged, 2 extrapolates."""
    return merge(init_params, [merged_params], "lerp", liti_rate=liti_rate)


def slerp(init_params: Params, policies: Sequence[Params], **options: Any) -> Params:
    """Spherical interpolation of the policies' task vectors, each unit by its own angle.

    For two policies (paper, section 3.2, Eq. 2), with w the one number in `weights`:
        init + sin((1 - w) angle) / sin(angle) * delta_1 + sin(w angle) / sin(angle) * delta_2
    so w = 0 gives the first policy, 1 the second. For M policies: the recursion of Eq. 26, by default with weights
    1/2, 1/3, ..., 1/M; the result then depends on their order.
    """
    return merge(init_params, policies, "slerp", **options)


def slerp_liti(init_params: Params, policies: Sequence[Params], liti_rate: float | Array, **options: Any) -> Params:
    """liti(init, slerp(init, policies), liti_rate) in one weighted sum, rounded once."""
    return merge(init_params, policies, "slerp", liti_rate=liti_rate, **options)


def symmetric_slerp(init_params: Params, policies: Sequence[Params], **options: Any) -> Params:
    """The mean task vector, each unit stretched to the mean length of its task vectors: no order among policies."""
    return merge(init_params, policies, "slerp_symmetric", **options)


def lerp(
    init_params: Params, policies: Sequence[Params], weights: Sequence[float] | None = None, **options: Any
) -> Params:
    """Init + sum_m weights[m] * (policy_m - init); the default weights are 1 / M, a uniform soup (paper, App. B)."""
    return merge(init_params, policies, "lerp", weights=weights, **options)


def task_arithmetic(
    init_params: Params, policies: Sequence[Params], weights: Sequence[float] | None = None, **options: Any
) -> Params:
    """Init + sum_m weights[m] * (policy_m - init); the default weights are 1 (arXiv 2212.04089)."""
    return merge(init_params, policies, "task_arithmetic", weights=weights, **options)


def model_stock(init_params: Params, policies: Sequence[Params], unit: units.Unit = "tensor", **options: Any) -> Params:
    """The mean of the policies, drawn back to init by their angle: ratio M cos / (1 + (M - 1) cos) (arXiv 2403.19522).

    At 90 degrees, where policies trained by RL are, it returns init (the paper's Appendix C.2).
    """
    return merge(init_params, policies, "model_stock", unit=unit, **options)


def slerp_full_weights(init_params: Params, policies: Sequence[Params], **options: Any) -> Params:
    """liti(init, slerp(zeros_like(init), policies), liti_rate): SLERP of the weights themselves.

    They are nearly collinear, so this is nearly LERP: a negative result to compare with (the paper's Appendix C.2).
    """
    return merge(init_params, policies, FULL_WEIGHTS, **options)


def merge(
    init_params: Params,
    policies: Sequence[Params],
    method: str = "slerp",
    *,
    liti_rate: float | Array = 1.0,
    weights: Sequence[float] | None = None,
    unit: units.Unit = "layer",
    stacked: str | None = "layers",
    donate: bool = False,
) -> Params:
    """(1 - liti_rate) * init + liti_rate * merged, where merged is the policies' merge by one of METHODS.

    All functions above end here; their options and errors are those of this one, told at the top of the module.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, want one of {', '.join(METHODS)}")
    _check_policies(init_params, policies)
    with jax.enable_x64(True):
        if METHODS[method].by_angle:
            start = jax.tree.map(jnp.zeros_like, init_params) if method == FULL_WEIGHTS else init_params
            inner = gram(start, policies, unit, stacked=stacked)
        else:  # the same in every unit
            unit, inner = "model", Gram(np.zeros((1, len(policies), len(policies))), ("model",))
        layout = leaf_units.units_of(init_params, unit, stacked)
        solved = solve(method, inner.matrix, weights, inner.names)
        sums = with_liti(method, solved, _as_float64(liti_rate))
        leaves, treedef = jax.tree.flatten(init_params)
        columns = [jax.tree.leaves(policy) for policy in policies]
        merged = [
            kernels.weighted_sum(init, parts, sums[unit_ids], donate=donate)
            for init, unit_ids, *parts in zip(leaves, layout.of_leaf, *columns, strict=True)
        ]
    return jax.tree.unflatten(treedef, merged)


def gram(
    init_params: Params, policies: Sequence[Params], unit: units.Unit = "layer", *, stacked: str | None = "layers"
) -> Gram:
    """<delta_a, delta_b> for every pair of task vectors and every unit, summed in float64."""
    _check_policies(init_params, policies)
    layout = leaf_units.units_of(init_params, unit, stacked)
    columns = [jax.tree.leaves(p) for p in policies]
    with jax.enable_x64(True):
        inner = [
            kernels.gram(init, parts, stacked=unit_ids.ndim > 0)
            for init, unit_ids, *parts in zip(jax.tree.leaves(init_params), layout.of_leaf, *columns, strict=True)
        ]
        shape = (len(layout.names), len(policies), len(policies))
        if any(isinstance(matrix, jax.core.Tracer) for matrix in inner):
            total = jnp.zeros(shape, jnp.float64)
            for unit_ids, matrix in zip(layout.of_leaf, inner, strict=True):
                total = total.at[unit_ids].add(matrix)
            return Gram(total, layout.names)
        summed = np.zeros(shape)
        for unit_ids, matrix in zip(layout.of_leaf, inner, strict=True):
            np.add.at(summed, unit_ids, np.asarray(matrix))
        return Gram(summed, layout.names)


def _as_float64(rate: float | Array) -> Any:
    return jnp.asarray(rate, jnp.float64) if isinstance(rate, jax.Array) else rate


def _check_policies(init_params: Params, policies: Sequence[Params]) -> None:
    if not policies:
        raise ValueError("policies: got none, want at least one")
    trees.check_floating(init_params, "init_params")
    for m, policy in enumerate(policies):
        trees.check_floating(policy, f"policy {m}")
        trees.check_same_structure(init_params, policy, f"policy {m}")


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)
