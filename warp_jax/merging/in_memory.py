"""Merging of pytrees in memory. See `warp_jax.merging` for the arguments and errors that all merges share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from warp_jax import naming, trees
from warp_jax.merging import kernels, units
from warp_jax.merging.coefficients import FULL_WEIGHTS, METHODS, solve, with_liti
from warp_jax.types import Array, HostOrDevice, Params

# LITI rate: a number, one for each unit, [U], or a function from the names of the units to these
Rate = float | HostOrDevice | Callable[[Sequence[str]], HostOrDevice | Sequence[float]]


class Gram(NamedTuple):
    """Inner products of M task vectors in each of U units."""

    matrix: HostOrDevice  # float64 [U, M, M]; a numpy array, or a JAX array inside jit
    names: tuple[str, ...]  # names of the units


def task_vector(params: Params, init_params: Params) -> Params:
    """Difference params - init_params in float32, leaf by leaf (delta in the paper)."""
    trees.check_same_structure(init_params, params, "params")
    return jax.tree.map(lambda new, init: _f32(new) - _f32(init), params, init_params)


def ema_update(anchor_params: Params, params: Params, ema_rate: float | Array) -> Params:
    """Move the anchor towards params: (1 - ema_rate) * anchor + ema_rate * params (Algorithm 1, line 9).

    ema_rate: weight of the NEW weights; 0 keeps the anchor, 1 copies params. Keep the anchor in float32: at a rate of
    0.01 a bfloat16 anchor never moves.
    """

    def update(anchor: Array, new: Array) -> Array:
        mixed = (1 - ema_rate) * _f32(anchor) + ema_rate * _f32(new)
        return mixed.astype(anchor.dtype)

    return jax.tree.map(update, anchor_params, params)


def liti(init_params: Params, merged_params: Params, liti_rate: Rate, **options: Any) -> Params:
    """Interpolate from init to merged: (1 - liti_rate) * init + liti_rate * merged (Algorithm 1, line 13).

    liti_rate: 0 gives init, 1 merged; above 1 extrapolates.
    """
    return merge(init_params, [merged_params], "lerp", liti_rate=liti_rate, **options)


def lines(liti_rate: float | Array, alpha: float) -> Rate:
    """LITI rate that grows with depth: liti_rate * (alpha + (1 - alpha) l / (L - 1)) in layer l (arXiv 2410.17146).

    alpha: share of the first layer, from 0 to 1; the last layer takes the whole rate. Units outside layers take alpha.
    """
    return functools.partial(_lines_rates, liti_rate, alpha)


def _lines_rates(liti_rate: float | Array, alpha: float, names: Sequence[str]) -> HostOrDevice:
    return _wide(liti_rate) * units.depth_shares(names, alpha)


def slerp(init_params: Params, policies: Sequence[Params], **options: Any) -> Params:
    """Spherical interpolation of the policies' task vectors, with one angle per unit.

    Two policies and weights = [w] (paper, section 3.2, Eq. 2); w = 0 gives the first policy, 1 the second:
        init + sin((1 - w) angle) / sin(angle) * delta_1 + sin(w angle) / sin(angle) * delta_2
    M policies: the recursion of Eq. 26, by default with weights 1/2, 1/3, ..., 1/M; their order matters. See `karcher`.
    """
    return merge(init_params, policies, "slerp", **options)


def slerp_liti(init_params: Params, policies: Sequence[Params], liti_rate: Rate, **options: Any) -> Params:
    """Compute liti(init, slerp(init, policies), liti_rate) as one weighted sum, rounded once."""
    return merge(init_params, policies, "slerp", liti_rate=liti_rate, **options)


def karcher(
    init_params: Params, policies: Sequence[Params], weights: Sequence[float] | None = None, **options: Any
) -> Params:
    """Spherical mean of any number of policies, which has no order; two of them give SLERP (arXiv 2603.04972).

    weights: one for each policy, with the sum 1; by default 1 / M.
    """
    return merge(init_params, policies, "karcher", weights=weights, **options)


def symmetric_slerp(init_params: Params, policies: Sequence[Params], **options: Any) -> Params:
    """Mean task vector, scaled in each unit to the mean length of the task vectors. The order does not matter."""
    return merge(init_params, policies, "slerp_symmetric", **options)


def lerp(
    init_params: Params, policies: Sequence[Params], weights: Sequence[float] | None = None, **options: Any
) -> Params:
    """Linear interpolation: init + sum_m weights[m] * (policy_m - init). Default weights: 1 / M (paper, Appendix B)."""
    return merge(init_params, policies, "lerp", weights=weights, **options)


def task_arithmetic(
    init_params: Params, policies: Sequence[Params], weights: Sequence[float] | None = None, **options: Any
) -> Params:
    """Task arithmetic: init + sum_m weights[m] * (policy_m - init). Default weights: 1 (arXiv 2212.04089)."""
    return merge(init_params, policies, "task_arithmetic", weights=weights, **options)


def model_stock(init_params: Params, policies: Sequence[Params], unit: units.Unit = "tensor", **options: Any) -> Params:
    """Model Stock: a step of M cos / (1 + (M - 1) cos) from init to the mean of the policies (arXiv 2403.19522).

    Policies trained by RL are at about 90 degrees, where this returns init (WARP, Appendix C.2).
    """
    return merge(init_params, policies, "model_stock", unit=unit, **options)


def slerp_full_weights(init_params: Params, policies: Sequence[Params], **options: Any) -> Params:
    """SLERP of the weights themselves: liti(init, slerp(zeros_like(init), policies), liti_rate), rounded once.

    The weights are nearly collinear, so this is nearly LERP: a negative result to compare with (paper, Appendix C.2).
    """
    return merge(init_params, policies, FULL_WEIGHTS, **options)


def merge(
    init_params: Params,
    policies: Sequence[Params],
    method: str = "slerp",
    *,
    liti_rate: Rate = 1.0,
    weights: Sequence[float] | None = None,
    donate: bool = False,
    rounding_key: Array | None = None,
    **layout: Any,
) -> Params:
    """Merge the policies by one of METHODS, then interpolate: (1 - liti_rate) * init + liti_rate * merged.

    All merges above call this one. layout: unit, stacked, layer_axis. See `warp_jax.merging` for arguments and errors.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, want one of {', '.join(METHODS)}")
    _check_policies(init_params, policies)
    with jax.enable_x64(True):
        by_angle = METHODS[method].by_angle
        one_rate = not callable(liti_rate) and np.ndim(liti_rate) == 0
        if one_rate and not by_angle:  # the coefficients are the same in every unit
            layout |= {"unit": "model", "stacked": None}
        names, unit_of_leaf = units_of(init_params, **layout)
        matrix: HostOrDevice = np.zeros((len(names), len(policies), len(policies)))
        if by_angle:
            start = jax.tree.map(jnp.zeros_like, init_params) if method == FULL_WEIGHTS else init_params
            matrix = gram(start, policies, **layout).matrix
        solved = solve(method, matrix, weights, names)
        rate = _wide(liti_rate(names) if callable(liti_rate) else liti_rate)
        if rate.shape not in ((), (len(names),)):
            raise ValueError(
                f"liti_rate: got shape {rate.shape}, want a number, or one for each of the {len(names)} units "
                f"({names[0]}, ...)"
            )
        sums = with_liti(method, solved, rate)
        columns = map(jax.tree.leaves, (init_params, *policies))
        keys = [None] * len(unit_of_leaf) if rounding_key is None else jax.random.split(rounding_key, len(unit_of_leaf))
        merged = [
            kernels.weighted_sum(init, parts, sums[unit_ids], donate=donate, rounding_key=key)
            for key, unit_ids, init, *parts in zip(keys, unit_of_leaf, *columns, strict=True)
        ]
    return jax.tree.unflatten(jax.tree.structure(init_params), merged)


def gram(init_params: Params, policies: Sequence[Params], unit: units.Unit = "layer", **layout: Any) -> Gram:
    """Inner products <delta_a, delta_b> of every pair of task vectors in every unit, summed in float64.

    layout: stacked and layer_axis.
    """
    _check_policies(init_params, policies)
    names, unit_of_leaf = units_of(init_params, unit, **layout)
    columns = map(jax.tree.leaves, (init_params, *policies))
    with jax.enable_x64(True):
        inner = [
            kernels.gram(init, parts, layer_axis=unit_ids.ndim - 1 if unit_ids.ndim else None)
            for unit_ids, init, *parts in zip(unit_of_leaf, *columns, strict=True)
        ]
        traced = any(isinstance(matrix, jax.core.Tracer) for matrix in inner)
        total: Any = (jnp if traced else np).zeros((len(names), len(policies), len(policies)), np.float64)
        for unit_ids, matrix in zip(unit_of_leaf, inner, strict=True):
            rows = unit_ids.reshape(-1) if unit_ids.ndim else unit_ids
            if traced:
                total = total.at[rows].add(matrix)
            else:
                np.add.at(total, rows, np.asarray(matrix))
        return Gram(total, names)


def units_of(
    tree: Params, unit: units.Unit = "layer", stacked: str | None = "layers", layer_axis: int = 0
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Assign each leaf to a unit, and each layer of a leaf that is stacked under the key `stacked`.

    Returns:
      Names of the units, in order of first use; and for each leaf, in `jax.tree.leaves` order, the number of its unit,
      int32 [], or of its layers' units, with L as axis layer_axis after axes of length 1: [L], [1, L], ...
    """
    unit_fn = units.unit_function(unit)
    numbers: dict[str, int] = {}
    unit_of_leaf = []
    leaves = [(trees.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for name, leaf in leaves:
        in_layers = leaf.ndim > 0 and naming.is_stacked(name, stacked)
        if in_layers and not 0 <= layer_axis < leaf.ndim:
            raise ValueError(f"layer_axis: got {layer_axis}, want an axis of leaf {name!r} of shape {leaf.shape}")
        members = naming.layer_names(name, leaf.shape[layer_axis], stacked) if in_layers else [name]
        ids = np.array([numbers.setdefault(unit_fn(member), len(numbers)) for member in members], np.int32)
        unit_of_leaf.append(ids.reshape((1,) * layer_axis + (-1,)) if in_layers else ids[0])
    units.check_stacks({name: leaf.shape for name, leaf in leaves}, stacked, layer_axis)
    return tuple(numbers), unit_of_leaf


def _check_policies(init_params: Params, policies: Sequence[Params]) -> None:
    if not policies:
        raise ValueError("policies: got none, want at least one")
    trees.check_floating(init_params, "init_params")
    for m, policy in enumerate(policies):
        trees.check_floating(policy, f"policy {m}")
        trees.check_same_structure(init_params, policy, f"policy {m}")


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _wide(rate: Any) -> HostOrDevice:
    """One rate or several in float64, as an array."""
    return rate.astype(jnp.float64) if isinstance(rate, jax.Array) else np.asarray(rate, np.float64)
