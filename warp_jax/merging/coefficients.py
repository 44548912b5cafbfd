"""Coefficients of task vectors in a merge, computed from the inner products (Gram matrix) of the task vectors.

    merged = init + liti_rate * sum_m c_m * delta_m        delta_m = policy_m - init, one c_m per unit

A Gram matrix [U, M, M] holds <delta_a, delta_b> for each of U units. Every method needs nothing else, so a merge reads
the weights twice, for any M. Arrays are float64. They are numpy arrays, or JAX arrays inside jit: each function uses
the array library of its argument.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from warp_jax.merging import sphere

PARALLEL_SIN = 1e-6  # below this sine two task vectors count as parallel (merged by LERP) or opposite (an error)

SUM_TOLERANCE = 1e-6  # of weights that must add up to 1
MAX_PERMUTED = 4  # policies; more are compared in their cyclic orders only

Matrix = Any  # float64 [U, M, M], numpy or JAX
Weights = Sequence[float] | None


class Method(NamedTuple):
    """A merging method."""

    solve: Callable[[Matrix, Weights], Any]  # (Gram matrices [U, M, M], weights or None) -> coefficients [U, M]
    by_angle: bool = True  # False: `solve` uses only the shape of the matrices


def norms(matrix: Matrix) -> Any:
    """L2 norm of each task vector: [U, M]."""
    return _squares(matrix) ** 0.5


def angles(matrix: Matrix) -> Any:
    """Angle between each pair of task vectors, in radians: [U, M, M]. 0 if either vector is zero."""
    squares = _squares(matrix)
    return _angle(squares[..., :, None], squares[..., None, :], matrix)[0]


def slerp_coefficients(matrix: Matrix, weights: Weights = None) -> Any:
    """Spherical interpolation by the paper's recursion (Eq. 2 and 26).

    weights: the M - 1 weights of the recursion, the m-th for policy m + 1; by default 1/2, 1/3, ..., 1/M. For M > 2 the
    result depends on the order of the policies. Zero and parallel task vectors are averaged linearly (the limit of
    SLERP). Opposite task vectors give NaN.
    """
    xp, count = matrix.__array_namespace__(), matrix.shape[-1]
    chosen = _choose(weights, [1.0 / m for m in range(2, count + 1)], count, "one for each after the first")
    columns = [xp.ones_like(matrix[:, 0, 0])]
    for m, weight in enumerate(chosen, start=1):
        so_far = xp.stack(columns, axis=-1)
        inner = xp.einsum("um,umn->un", so_far, matrix[:, :m, :])
        square = xp.einsum("un,un->u", inner[:, :m], so_far)
        first, second = slerp_pair(square, matrix[:, m, m], inner[:, m], weight)
        columns = [first * c for c in columns] + [second]
    return xp.stack(columns, axis=-1)


def symmetric_slerp_coefficients(matrix: Matrix, weights: Weights = None) -> Any:
    """One coefficient for all policies, so that their order does not matter. Takes no weights.

    It is 1/M times the factor that gives the merge the mean length of the task vectors. For M = 2 and equal lengths
    this is SLERP at 1/2. Task vectors that add up to zero give NaN.
    """
    xp, count = matrix.__array_namespace__(), matrix.shape[-1]
    _choose(weights, [], count, "the symmetric slerp sets them itself")
    mean_length = norms(matrix).mean(-1)
    lerp_length = xp.clip(matrix.sum((-2, -1)), 0, None) ** 0.5 / count
    opposite = (lerp_length <= PARALLEL_SIN * mean_length) & (mean_length > 0)
    scale = xp.where(mean_length > 0, mean_length / xp.where(lerp_length > 0, lerp_length, 1), 1.0)
    scale = xp.where(opposite, xp.nan, scale)
    return xp.broadcast_to(scale[:, None] / count, matrix.shape[:-1])


def karcher_coefficients(matrix: Matrix, weights: Weights = None) -> Any:
    """Spherical mean of any number of policies (Karcher or Frechet mean; arXiv 2603.04972), in no order.

    weights: one for each policy, from 0 to 1 with the sum 1; by default 1/M. The mean of the directions on the sphere
    is sum_m c_m delta_m / |delta_m|. As in the paper's SLERP, the merge mixes the task vectors themselves, with these
    c_m. So two policies and weights (1 - w, w) give SLERP at w, for any lengths. Equal lengths give the mean direction
    at that length, as in mergekit. Near-parallel task vectors are averaged linearly, and a zero one counts as parallel
    to the mean. Task vectors without a mean, such as two opposite ones, give NaN.
    """
    xp, count = matrix.__array_namespace__(), matrix.shape[-1]
    chosen = _choose(weights, [1.0 / count] * count, count, "one each")
    if not (min(chosen) >= 0 and abs(sum(chosen) - 1) < SUM_TOLERANCE):
        raise ValueError(f"weights: got {tuple(chosen)}, want numbers from 0 to 1 that add up to 1 for karcher")
    if count == 2:  # exact up to 180 degrees
        return slerp_coefficients(matrix, chosen[1:])
    lengths = norms(matrix)
    safe = xp.where(lengths > 0, lengths, 1.0)
    cosines = matrix / (safe[:, :, None] * safe[:, None, :])
    return sphere.mean(cosines, xp.broadcast_to(xp.asarray(chosen, dtype=matrix.dtype), lengths.shape))


def lerp_coefficients(matrix: Matrix, weights: Weights = None) -> Any:
    """Linear interpolation (paper, Appendix B): the weights, by default 1/M (a uniform soup), in every unit."""
    return _same_in_every_unit(matrix, weights, default=1.0 / matrix.shape[-1])


def task_arithmetic_coefficients(matrix: Matrix, weights: Weights = None) -> Any:
    """Sum of task vectors (Ilharco et al. 2023, arXiv 2212.04089): the weights, by default 1, in every unit."""
    return _same_in_every_unit(matrix, weights, default=1.0)


def model_stock_coefficients(matrix: Matrix, weights: Weights = None) -> Any:
    """Model Stock (Jang et al. 2024, arXiv 2403.19522, Eq. 3 and 5). Takes no weights.

    All coefficients of a unit are t / M, t = M cos / (1 + (M - 1) cos), with cos the mean cosine between two of its
    task vectors; 1 / M if all of them are zero.
    """
    xp, count = matrix.__array_namespace__(), matrix.shape[-1]
    _choose(weights, [], count, "model stock sets them itself")
    if count < 2:
        raise ValueError(f"policies: got {count}, want at least two for model stock")
    mean = (xp.cos(angles(matrix)).sum((-2, -1)) - count) / (count * (count - 1))
    below = 1 + (count - 1) * mean
    ratio = xp.where(below > 0, count * mean / xp.where(below > 0, below, 1), xp.nan)
    return xp.broadcast_to(ratio[:, None] / count, matrix.shape[:-1])


FULL_WEIGHTS = "slerp_full_weights"  # SLERP from zero in place of init, then LITI from init to the merge

METHODS = {
    "slerp": Method(slerp_coefficients),
    "karcher": Method(karcher_coefficients),
    "slerp_symmetric": Method(symmetric_slerp_coefficients),
    "lerp": Method(lerp_coefficients, by_angle=False),
    "task_arithmetic": Method(task_arithmetic_coefficients, by_angle=False),
    "model_stock": Method(model_stock_coefficients),
    FULL_WEIGHTS: Method(slerp_coefficients),
}


def order_spread(matrix: np.ndarray) -> np.ndarray:
    """Largest change of `slerp` by another order of the policies, relative to the length of the merge: [U].

    Compares with all orders of up to MAX_PERMUTED policies, else with the cyclic ones. Leaves out undefined merges.
    """
    count = matrix.shape[-1]
    cyclic = [tuple(np.roll(range(count), shift)) for shift in range(count)]
    given, changes = slerp_coefficients(matrix), []
    for order in itertools.permutations(range(count)) if count <= MAX_PERMUTED else cyclic:
        places = np.argsort(order)
        changes.append(slerp_coefficients(matrix[:, order][:, :, order])[:, places] - given)
    squares = [np.einsum("um,umn,un->u", c, matrix, c) for c in (given, *changes)]
    largest = np.fmax.reduce(squares[1:]).clip(0)
    return np.sqrt(largest / np.where(squares[0] > 0, squares[0], 1))


def with_liti(method: str, coefficients: Any, liti_rate: Any) -> Any:
    """Weights of (init, policy_1 - init, ..., policy_M - init) in liti(init, merge, liti_rate): [U, 1 + M].

    liti_rate: a number, or one for each unit, [U].
    """
    rate = liti_rate[:, None] if np.ndim(liti_rate) else liti_rate
    # full weights: sum_m c_m policy_m = init + (sum_m c_m - 1) init + sum_m c_m (policy_m - init)
    of_init = coefficients.sum(-1) - 1 if method == FULL_WEIGHTS else 0 * coefficients[..., 0]
    columns = [1 + rate * of_init[..., None], rate * coefficients]
    return columns[0].__array_namespace__().concat(columns, axis=-1)


def check_method(method: str, weights: Weights, count: int) -> None:
    """Raise ValueError unless there is such a method, and it takes these weights and so many policies."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, want one of {', '.join(METHODS)}")
    METHODS[method].solve(np.eye(count)[None], weights)


def solve(method: str, matrix: Matrix, weights: Weights, names: Sequence[str]) -> Any:
    """Coefficients [U, M] of a method. Units whose merge is undefined raise ValueError; inside jit they give NaN."""
    if bad := _not_finite(matrix, names):
        raise ValueError(f"policies: NaN or Inf in the task vectors of {bad}; leave out the policy that holds them")
    coefficients = METHODS[method].solve(matrix, weights)
    if bad := _not_finite(coefficients[..., None], names):
        raise ValueError(
            f"policies: task vectors are opposite or cancel out in {bad}, where {method} has no result; leave out a "
            "policy, or merge by lerp"
        )
    return coefficients


def _not_finite(values: Any, names: Sequence[str]) -> str:
    """The units with values that are not finite; "" inside jit."""
    if not isinstance(values, np.ndarray):
        return ""
    finite = np.atleast_1d(np.isfinite(values).all((-2, -1)))
    return ", ".join(name for name, good in zip(names, finite, strict=True) if not good)


def slerp_pair(square_1: Any, square_2: Any, inner: Any, weight: float) -> tuple[Any, Any]:
    """Coefficients of SLERP (Eq. 2) from |delta_1|^2, |delta_2|^2 and <delta_1, delta_2>. Weight 1 gives the second."""
    xp = square_1.__array_namespace__()
    angle, sine = _angle(square_1, square_2, inner)
    parallel = sine < PARALLEL_SIN
    safe_sine = xp.where(parallel, 1, sine)
    first, second = (xp.sin(share * angle) / safe_sine for share in (1 - weight, weight))
    straight, opposite = parallel & (angle < 1), parallel & (angle > 1)
    first, second = xp.where(straight, 1 - weight, first), xp.where(straight, weight, second)
    return xp.where(opposite, xp.nan, first), xp.where(opposite, xp.nan, second)


def _angle(square_1: Any, square_2: Any, inner: Any) -> tuple[Any, Any]:
    """Angle and its sine."""
    xp = inner.__array_namespace__()
    product = (square_1 * square_2) ** 0.5
    cosine = xp.clip(xp.where(product > 0, inner / xp.where(product > 0, product, 1), 1.0), -1, 1)
    return xp.arccos(cosine), ((1 - cosine) * (1 + cosine)) ** 0.5


def _squares(matrix: Matrix) -> Any:
    return matrix.__array_namespace__().einsum("...mm->...m", matrix)


def _same_in_every_unit(matrix: Matrix, weights: Weights, default: float) -> Any:
    xp, count = matrix.__array_namespace__(), matrix.shape[-1]
    chosen = _choose(weights, [default] * count, count, "one each")
    return xp.broadcast_to(xp.asarray(chosen, dtype=matrix.dtype), matrix.shape[:-1])


def _choose(weights: Weights, default: Sequence[float], count: int, which: str) -> Sequence[float]:
    """Return the weights, or the default if they are None; ValueError unless they are as many as the default."""
    if weights is not None and len(weights) != len(default):
        raise ValueError(f"weights: got {len(weights)} for {count} policies, want {len(default)}: {which}")
    return default if weights is None else weights
