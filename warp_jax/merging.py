"""The weight averaging of WARP (arXiv 2406.16768) on any pytree of arrays: EMA, SLERP and LITI.

Every function is pure and jittable, keeps structure, dtype and sharding. The EMA, which runs every step, is
float32 whatever the dtype of the weights. A merge, which runs once an iteration, is float64 inside and rounds
once, at the end: near 180 degrees the terms are 57 times longer than their sum, and a float32 cosine gives an
angle that is off by 1e-4 of itself. It reads the weights twice whatever M is, once for the Gram matrices and
once for one weighted sum.

    merged = init + liti_rate * sum_m c_m * (policy_m - init)        one c_m per unit, from `slerp_coefficients`
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from warp_jax import trees
from warp_jax.types import Array, Params

PARALLEL_SIN = 1e-6  # below this sine two task vectors count as parallel (merged by LERP) or opposite (an error)


class Gram(NamedTuple):
    """Inner products of M task vectors per unit. matrix: float64 [U, M, M]; names: U unit names."""

    matrix: Array
    names: tuple[str, ...]


def task_vector(params: Params, init_params: Params) -> Params:
    """Params - init_params in float32, leaf by leaf (the paper's delta)."""
    trees.check_same_structure(init_params, params, "params")
    return jax.tree.map(_delta, params, init_params)


def ema_update(anchor_params: Params, params: Params, ema_rate: float | Array) -> Params:
    """(1 - ema_rate) * anchor + ema_rate * params: `ema_rate` weighs the NEW weights (Algorithm 1, line 9).

    Keep the anchor in float32: at rate 0.01 a bfloat16 anchor never moves. 0 freezes it, 1 copies params.
    """

    def update(anchor: Array, new: Array) -> Array:
        mixed = (1 - ema_rate) * _f32(anchor) + ema_rate * _f32(new)
        return mixed.astype(anchor.dtype)

    return jax.tree.map(update, anchor_params, params)


def lerp(init_params: Params, policies: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """Init + sum_m weights[m] * (policy_m - init); the default weights are 1 / M (paper, Appendix B)."""
    _check_policies(init_params, policies)
    count = len(policies)
    chosen = [1.0 / count] * count if weights is None else list(weights)
    if len(chosen) != count:
        raise ValueError(f"weights: got {len(chosen)} for {count} policies, want one each")
    with jax.enable_x64(True):
        coefficients = jnp.array([chosen], jnp.float64)
    return _weighted_sum(init_params, policies, coefficients, trees.units_of(init_params, "model"))


def slerp(init_params: Params, policies: Sequence[Params], **options: Any) -> Params:
    """Spherical interpolation of the policies' task vectors, each unit by its own angle.

    For two policies (paper, section 3.2, Eq. 2):
        init + sin((1 - w) angle) / sin(angle) * delta_1 + sin(w angle) / sin(angle) * delta_2
    so slerp_weight w = 0 gives the first policy, 1 the second. For M policies: the recursion of Eq. 26.
    Options and errors as in `slerp_liti`, of which this is the case liti_rate = 1.
    """
    return slerp_liti(init_params, policies, 1.0, **options)


def liti(init_params: Params, merged_params: Params, liti_rate: float | Array) -> Params:
    """(1 - liti_rate) * init + liti_rate * merged (Algorithm 1, line 13): 0 gives init, 1 merged, 2 extrapolates."""
    trees.check_same_structure(init_params, merged_params, "merged_params")

    def interpolate(init: Array, merged: Array) -> Array:
        return (_f64(init) + rate * (_f64(merged) - _f64(init))).astype(merged.dtype)

    with jax.enable_x64(True):
        rate = jnp.asarray(liti_rate, jnp.float64)
        return jax.tree.map(interpolate, init_params, merged_params)


def slerp_liti(
    init_params: Params,
    policies: Sequence[Params],
    liti_rate: float | Array,
    *,
    slerp_weights: Sequence[float] | None = None,
    unit: trees.Unit = "layer",
    symmetric: bool = False,
) -> Params:
    """liti(init, slerp(init, policies), liti_rate) in one weighted sum, rounded once.

    Args:
      init_params: where all policies started.
      policies: M >= 1 trees shaped like init_params.
      liti_rate: 0 gives init_params, 1 the spherical merge.
      slerp_weights: the M - 1 weights of the recursion, the m-th for policy m + 1; default 1/2, 1/3, ..., 1/M.
      unit: what shares one angle: "layer" (the paper), "tensor", "model", or a function leaf name -> unit name.
      symmetric: give all policies one coefficient, independent of their order (see `slerp_coefficients`).

    Raises:
      ValueError: no policy, trees that differ, a bad unit or weights, or (outside jit) opposite task vectors.
    """
    _check_policies(init_params, policies)
    units = trees.units_of(init_params, unit)
    inner = gram(init_params, policies, unit)
    _check_not_opposite(inner, slerp_weights, symmetric)
    coefficients = slerp_coefficients(inner.matrix, slerp_weights, symmetric=symmetric)
    with jax.enable_x64(True):
        coefficients = jnp.asarray(liti_rate, jnp.float64) * coefficients
    return _weighted_sum(init_params, policies, coefficients, units)


def gram(init_params: Params, policies: Sequence[Params], unit: trees.Unit = "layer") -> Gram:
    """<delta_a, delta_b> for every pair of task vectors and every unit, summed in float64."""
    _check_policies(init_params, policies)
    units = trees.units_of(init_params, unit)
    leaves = [jax.tree.leaves(p) for p in policies]
    count = len(policies)
    with jax.enable_x64(True):
        total = jnp.zeros((len(units.names), count, count), jnp.float64)
        for i, init in enumerate(jax.tree.leaves(init_params)):
            deltas = [_f64(policy[i]) - _f64(init) for policy in leaves]
            total = total.at[units.of_leaf[i]].add(_inner_products(deltas, keep_axes=units.of_leaf[i].ndim))
    return Gram(total, units.names)


def norms(matrix: Array) -> Array:
    """Length of each task vector: float32 [U, M] from a Gram matrix [U, M, M]."""
    with jax.enable_x64(True):
        return jnp.sqrt(jnp.diagonal(matrix, axis1=-2, axis2=-1)).astype(jnp.float32)


def angles(matrix: Array) -> Array:
    """Angle between each pair of task vectors, radians: float32 [U, M, M]. 0 where either is zero."""
    with jax.enable_x64(True):
        squares = jnp.diagonal(matrix, axis1=-2, axis2=-1)
        angle, _ = _angle(squares[..., :, None], squares[..., None, :], matrix)
        return angle.astype(jnp.float32)


def slerp_coefficients(
    matrix: Array, slerp_weights: Sequence[float] | None = None, *, symmetric: bool = False
) -> Array:
    """Weights c of the merge init + sum_m c_m delta_m, from Gram matrices [U, M, M]: float64 [U, M].

    Default: the paper's recursion (Eq. 26), in which merge m has slerp weight 1/m; its result depends on
    the order of the policies for M > 2. `symmetric`: every policy gets 1/M times the factor that makes the
    length of the merge the mean length of the task vectors; for M = 2 with equal lengths it is slerp at 1/2.
    Zero and parallel task vectors fall back to LERP, which is the limit; opposite ones give NaN.
    """
    count = matrix.shape[-1]
    weights = [1.0 / m for m in range(2, count + 1)] if slerp_weights is None else list(slerp_weights)
    if len(weights) != count - 1:
        raise ValueError(f"slerp_weights: got {len(weights)} for {count} policies, want {count - 1}")
    if symmetric and slerp_weights is not None:
        raise ValueError("slerp_weights: got weights with symmetric=True, want one or the other")
    with jax.enable_x64(True):
        matrix = jnp.asarray(matrix, jnp.float64)
        solve = _symmetric_coefficients if symmetric else _recursive_coefficients
        return solve(matrix, weights)


def _recursive_coefficients(matrix: Array, weights: Sequence[float]) -> Array:
    units, count = matrix.shape[0], matrix.shape[-1]
    coefficients = jnp.zeros((units, count), jnp.float64).at[:, 0].set(1.0)
    for m, weight in enumerate(weights, start=1):
        so_far = jnp.einsum("um,umn->un", coefficients, matrix)
        first, second = slerp_pair(jnp.einsum("un,un->u", so_far, coefficients), matrix[:, m, m], so_far[:, m], weight)
        coefficients = (coefficients * first[:, None]).at[:, m].set(second)
    return coefficients


def _symmetric_coefficients(matrix: Array, weights: Sequence[float]) -> Array:
    units, count = matrix.shape[0], matrix.shape[-1]
    mean_length = jnp.sqrt(jnp.diagonal(matrix, axis1=-2, axis2=-1)).mean(-1)
    lerp_length = jnp.sqrt(jnp.clip(matrix.sum((-2, -1)), 0)) / count
    opposite = (lerp_length <= PARALLEL_SIN * mean_length) & (mean_length > 0)
    scale = jnp.where(mean_length > 0, mean_length / jnp.where(lerp_length > 0, lerp_length, 1), 1.0)
    scale = jnp.where(opposite, jnp.nan, scale)
    return jnp.broadcast_to(scale[:, None] / count, (units, count))


def slerp_pair(square_1: Array, square_2: Array, inner: Array, weight: float) -> tuple[Array, Array]:
    """The two factors of SLERP (Eq. 2) from |delta_1|^2, |delta_2|^2 and <delta_1, delta_2>."""
    angle, sine = _angle(square_1, square_2, inner)
    straight = (sine < PARALLEL_SIN) & (angle < 1)
    safe_sine = jnp.where(straight, 1, sine)
    first = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / safe_sine)
    second = jnp.where(straight, weight, jnp.sin(weight * angle) / safe_sine)
    opposite = (sine < PARALLEL_SIN) & (angle > 1)
    return jnp.where(opposite, jnp.nan, first), jnp.where(opposite, jnp.nan, second)


def _angle(square_1: Array, square_2: Array, inner: Array) -> tuple[Array, Array]:
    product = jnp.sqrt(square_1 * square_2)
    cosine = jnp.clip(jnp.where(product > 0, inner / jnp.where(product > 0, product, 1), 1.0), -1, 1)
    return jnp.arccos(cosine), jnp.sqrt((1 - cosine) * (1 + cosine))


def _inner_products(deltas: Sequence[Array], keep_axes: int) -> Array:
    """[M, M], or [L, M, M] with keep_axes = 1."""
    axes = tuple(range(keep_axes, deltas[0].ndim))
    rows = [[jnp.sum(a * b, axis=axes) for b in deltas[: i + 1]] for i, a in enumerate(deltas)]
    count = len(deltas)
    full = [[rows[max(a, b)][min(a, b)] for b in range(count)] for a in range(count)]
    return jnp.stack([jnp.stack(row, -1) for row in full], -2)


def _weighted_sum(init_params: Params, policies: Sequence[Params], coefficients: Array, units: trees.Units) -> Params:
    """Init + sum_m coefficients[unit, m] * (policy_m - init), in the dtype of the policies."""
    chex.assert_shape(coefficients, (len(units.names), len(policies)))
    leaves, treedef = jax.tree.flatten(init_params)
    columns = [jax.tree.leaves(p) for p in policies]
    merged = []
    with jax.enable_x64(True):
        for i, init in enumerate(leaves):
            mixed = _f64(init)
            for m, column in enumerate(columns):
                factor = coefficients[units.of_leaf[i], m]
                factor = factor.reshape(factor.shape + (1,) * (init.ndim - factor.ndim))
                mixed = mixed + factor * (_f64(column[i]) - _f64(init))
            merged.append(mixed.astype(columns[0][i].dtype))
    return jax.tree.unflatten(treedef, merged)


def _check_policies(init_params: Params, policies: Sequence[Params]) -> None:
    if not policies:
        raise ValueError("policies: got none, want at least one")
    for m, policy in enumerate(policies):
        trees.check_same_structure(init_params, policy, f"policy {m}")


def _check_not_opposite(inner: Gram, slerp_weights: Sequence[float] | None, symmetric: bool) -> None:
    if isinstance(inner.matrix, jax.core.Tracer):
        return
    bad = np.isnan(np.asarray(slerp_coefficients(inner.matrix, slerp_weights, symmetric=symmetric))).any(-1)
    bad |= ~np.isfinite(np.asarray(inner.matrix)).all((-2, -1))
    if bad.any():
        names = ", ".join(name for name, is_bad in zip(inner.names, bad, strict=True) if is_bad)
        raise ValueError(f"policies: opposite or non-finite task vectors in {names}; their SLERP is undefined")


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _f64(x: Array) -> Array:
    return x.astype(jnp.float64)


def _delta(params: Array, init: Array) -> Array:
    return _f32(params) - _f32(init)
