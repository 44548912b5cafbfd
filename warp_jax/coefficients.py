"""From the Gram matrices of task vectors to the weight of each in a merge.

    merged = init + sum_m c_m * delta_m        one c_m for each unit

A Gram matrix [U, M, M] holds <delta_a, delta_b> for each of U units; every method below is a function of it alone,
so a merge reads the weights twice whatever M is. All arithmetic is float64.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from warp_jax.types import Array, HostOrDevice

PARALLEL_SIN = 1e-6  # below this sine two task vectors count as parallel (merged by LERP) or opposite (an error)

Weights = Sequence[float] | None


class Method(NamedTuple):
    """solve: (Gram matrices [U, M, M], weights or None) -> coefficients [U, M].

    from_zero: the vectors are the weights themselves, not their differences from init.
    """

    solve: Callable[[HostOrDevice, Weights], Array]
    from_zero: bool = False


def norms(matrix: HostOrDevice) -> Array:
    """Length of each task vector: float32 [U, M] from a Gram matrix [U, M, M]."""
    with jax.enable_x64(True):
        return jnp.sqrt(jnp.diagonal(matrix, axis1=-2, axis2=-1)).astype(jnp.float32)


def angles(matrix: HostOrDevice) -> Array:
    """Angle between each pair of task vectors, radians: float32 [U, M, M]. 0 where either is zero."""
    with jax.enable_x64(True):
        return _pair_angles(matrix).astype(jnp.float32)


def slerp_coefficients(matrix: HostOrDevice, weights: Weights = None) -> Array:
    """Spherical interpolation by the paper's recursion (Eq. 2 and 26): float64 [U, M].

    weights: the M - 1 weights of the recursion, the m-th for policy m + 1; by default 1/2, 1/3, ..., 1/M.
    For M > 2 the result depends on the order of the policies. Zero and parallel task vectors fall back to LERP,
    which is the limit; opposite ones give NaN.
    """
    count = matrix.shape[-1]
    chosen = [1.0 / m for m in range(2, count + 1)] if weights is None else list(weights)
    if len(chosen) != count - 1:
        raise ValueError(
            f"weights: got {len(chosen)} for {count} policies, want {count - 1}: one for each after the first"
        )
    with jax.enable_x64(True):
        return _recursive_coefficients(jnp.asarray(matrix, jnp.float64), chosen)


def symmetric_slerp_coefficients(matrix: HostOrDevice, weights: Weights = None) -> Array:
    """One coefficient for all policies, whatever their order: 1/M times the factor that makes the length of the merge
    the mean length of the task vectors; for M = 2 with equal lengths it is slerp at 1/2. Takes no weights.
    """
    _refuse_weights(weights, "the symmetric slerp")
    with jax.enable_x64(True):
        matrix = jnp.asarray(matrix, jnp.float64)
        units, count = matrix.shape[0], matrix.shape[-1]
        mean_length = jnp.sqrt(jnp.diagonal(matrix, axis1=-2, axis2=-1)).mean(-1)
        lerp_length = jnp.sqrt(jnp.clip(matrix.sum((-2, -1)), 0)) / count
        opposite = (lerp_length <= PARALLEL_SIN * mean_length) & (mean_length > 0)
        scale = jnp.where(mean_length > 0, mean_length / jnp.where(lerp_length > 0, lerp_length, 1), 1.0)
        scale = jnp.where(opposite, jnp.nan, scale)
        return jnp.broadcast_to(scale[:, None] / count, (units, count))


def lerp_coefficients(matrix: HostOrDevice, weights: Weights = None) -> Array:
    """Linear interpolation (paper, Appendix B): weights, by default 1 / M (a uniform soup), for every unit."""
    count = matrix.shape[-1]
    return _same_in_every_unit(matrix, [1.0 / count] * count if weights is None else weights)


def task_arithmetic_coefficients(matrix: HostOrDevice, weights: Weights = None) -> Array:
    """The sum of all task vectors (Ilharco et al. 2023, arXiv 2212.04089), each times its weight, by default 1."""
    return _same_in_every_unit(matrix, [1.0] * matrix.shape[-1] if weights is None else weights)


def model_stock_coefficients(matrix: HostOrDevice, weights: Weights = None) -> Array:
    """1 / M times t = M cos / (1 + (M - 1) cos), with the mean cosine between two task vectors of the unit
    (Jang et al. 2024, arXiv 2403.19522, Eq. 3 and 5); 1 / M where a unit did not move. Takes no weights.
    """
    _refuse_weights(weights, "model stock")
    count = matrix.shape[-1]
    if count < 2:
        raise ValueError(f"policies: got {count}, want at least two for model stock")
    with jax.enable_x64(True):
        cosines = jnp.cos(_pair_angles(matrix))
        mean = (cosines.sum((-2, -1)) - count) / (count * (count - 1))
        ratio = count * mean / (1 + (count - 1) * mean)
        return jnp.broadcast_to(ratio[:, None] / count, matrix.shape[:-1])


METHODS = {
    "slerp": Method(slerp_coefficients),
    "slerp_symmetric": Method(symmetric_slerp_coefficients),
    "lerp": Method(lerp_coefficients),
    "task_arithmetic": Method(task_arithmetic_coefficients),
    "model_stock": Method(model_stock_coefficients),
    "slerp_full_weights": Method(slerp_coefficients, from_zero=True),
}


def _same_in_every_unit(matrix: HostOrDevice, weights: Sequence[float]) -> Array:
    if len(weights) != matrix.shape[-1]:
        raise ValueError(f"weights: got {len(weights)} for {matrix.shape[-1]} policies, want one each")
    with jax.enable_x64(True):
        return jnp.broadcast_to(jnp.array(weights, jnp.float64), matrix.shape[:-1])


def _refuse_weights(weights: Weights, method: str) -> None:
    if weights is not None:
        raise ValueError(f"weights: got {len(weights)}, want none: {method} sets them itself")


def _recursive_coefficients(matrix: Array, weights: Sequence[float]) -> Array:
    units, count = matrix.shape[0], matrix.shape[-1]
    coefficients = jnp.zeros((units, count), jnp.float64).at[:, 0].set(1.0)
    for m, weight in enumerate(weights, start=1):
        so_far = jnp.einsum("um,umn->un", coefficients, matrix)
        first, second = slerp_pair(jnp.einsum("un,un->u", so_far, coefficients), matrix[:, m, m], so_far[:, m], weight)
        coefficients = (coefficients * first[:, None]).at[:, m].set(second)
    return coefficients


def slerp_pair(square_1: Array, square_2: Array, inner: Array, weight: float) -> tuple[Array, Array]:
    """The two factors of SLERP (Eq. 2) from |delta_1|^2, |delta_2|^2 and <delta_1, delta_2>."""
    angle, sine = _angle(square_1, square_2, inner)
    straight = (sine < PARALLEL_SIN) & (angle < 1)
    safe_sine = jnp.where(straight, 1, sine)
    first = jnp.where(straight, 1 - weight, jnp.sin((1 - weight) * angle) / safe_sine)
    second = jnp.where(straight, weight, jnp.sin(weight * angle) / safe_sine)
    opposite = (sine < PARALLEL_SIN) & (angle > 1)
    return jnp.where(opposite, jnp.nan, first), jnp.where(opposite, jnp.nan, second)


def _pair_angles(matrix: HostOrDevice) -> Array:
    matrix = jnp.asarray(matrix)
    squares = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    return _angle(squares[..., :, None], squares[..., None, :], matrix)[0]


def _angle(square_1: Array, square_2: Array, inner: Array) -> tuple[Array, Array]:
    product = jnp.sqrt(square_1 * square_2)
    cosine = jnp.clip(jnp.where(product > 0, inner / jnp.where(product > 0, product, 1), 1.0), -1, 1)
    return jnp.arccos(cosine), jnp.sqrt((1 - cosine) * (1 + cosine))
