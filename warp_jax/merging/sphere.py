"""Karcher (Frechet) mean of directions on the unit sphere, from their cosines alone.

The mean p minimises sum_m weight_m angle(p, u_m)^2 over unit vectors. It is a combination of the directions u_m, so the
search runs on M coefficients. Arrays are float64, numpy or JAX: each function uses the array library of its argument.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

STEPS = 32  # of Newton's method; near-orthogonal directions need 3 to 6
RESIDUAL = 1e-10  # accepted gradient in radians, relative to the coefficients of p: large ones amplify rounding
UNDEFINED = 1e-6  # smallest curvature of a minimum, and smallest sine of directions that are not parallel or opposite
REGULAR = 1e12  # bound on the size of a Hessian, relative to its smallest eigenvalue, that rounding leaves invertible


class _Tangents(NamedTuple):
    """The directions seen from a point p of the sphere; angle_m is the angle between p and u_m."""

    cosine: Any  # [U, M] cos(angle_m)
    sine: Any  # [U, M]
    pull: Any  # [U, M] weight_m angle_m / sin(angle_m)
    curvature: Any  # [U] sum_m pull_m cos(angle_m): smallest eigenvalue of the Hessian; above 0 at a strict minimum
    gradient: Any  # [U, M] coefficients of sum_m weight_m log_p(u_m) = sum_m pull_m u_m - curvature p


def mean(cosines: Any, weights: Any) -> Any:
    """Coefficients s of the mean p = sum_m s_m u_m, with s_m = pull_m / curvature (see _Tangents): [U, M].

    A vector without a direction counts as one along p. NaN where no mean is found: the weighted directions cancel out,
    p is not a minimum (too many directions are opposite to it), or the search does not converge.

    Args:
      cosines: <u_a, u_b>, [U, M, M]; rows and columns of 0 for zero vectors.
      weights: not negative, with the sum 1, [U, M].
    """
    xp = cosines.__array_namespace__()
    moved = xp.einsum("umm->um", cosines) > 0
    shares = xp.where(moved, weights, 0.0)
    total = shares.sum(-1)
    length = _length(cosines, shares)
    point = shares / xp.where(length > 0, length, 1.0)[:, None]
    point = _repeat(functools.partial(_newton_step, cosines, shares), point)
    at = _tangents(cosines, shares, point)
    converged = (xp.abs(at.gradient) < RESIDUAL * xp.abs(point).max(-1)[:, None]).all(-1)
    found = (at.curvature > UNDEFINED * total) & converged | (total == 0)
    curvature = xp.where(found, at.curvature + weights.sum(-1) - total, xp.nan)
    return xp.where(moved, at.pull, weights) / curvature[:, None]


def _repeat(step: Callable[[Any], Any], point: Any) -> Any:
    if isinstance(point, np.ndarray):
        with np.errstate(over="ignore", invalid="ignore"):  # opposite directions; the caller sees NaN
            for _ in range(STEPS):
                point = step(point)
        return point
    from jax import lax  # noqa: PLC0415  loaded already, if the arrays are JAX's

    return lax.fori_loop(0, STEPS, lambda _, moving: step(moving), point)


def _newton_step(cosines: Any, weights: Any, point: Any) -> Any:
    """Move the point, a vector of coefficients, along Newton's direction; along the gradient if that is not descent."""
    xp, count = cosines.__array_namespace__(), cosines.shape[-1]
    at = _tangents(cosines, weights, point)
    # Hessian: curvature I + sum_m bend_m t_m t_m^T, with t_m = u_m - cos(angle_m) p; in coefficients, t_m = e_m - cos p
    far = at.sine > 1e-3  # nearer, bend is weight / 3 up to 1e-6
    bend = xp.where(far, (weights - at.pull * at.cosine) / xp.where(far, at.sine, 1.0) ** 2, weights / 3)
    tangents = cosines - at.cosine[:, :, None] * at.cosine[:, None, :]  # <t_a, t_b> = <t_a, u_b>
    along = xp.einsum("um,umn->un", bend * at.cosine, tangents)
    hessian = bend[:, :, None] * tangents - point[:, :, None] * along[:, None, :]
    identity = xp.eye(count, dtype=cosines.dtype)[None]
    size = xp.abs(hessian).max((-2, -1)) * (1 + xp.abs(point).max(-1) ** 2)
    convex = at.curvature * REGULAR > size  # False also at a maximum, or for numbers that are not finite
    hessian = xp.where(convex[:, None, None], hessian + at.curvature[:, None, None] * identity, identity)
    moved = point + xp.linalg.solve(hessian, at.gradient[:, :, None])[:, :, 0]
    length = _length(cosines, moved)
    return moved / xp.where(length > 0, length, 1.0)[:, None]


def _tangents(cosines: Any, weights: Any, point: Any) -> _Tangents:
    xp = cosines.__array_namespace__()
    cosine = xp.clip(xp.einsum("umn,un->um", cosines, point), -1, 1)
    sine = ((1 - cosine) * (1 + cosine)) ** 0.5
    apart = (sine > UNDEFINED) | (cosine < 0)
    pull = weights * xp.where(apart, xp.arccos(cosine) / xp.maximum(sine, UNDEFINED), 1.0)
    curvature = (pull * cosine).sum(-1)
    return _Tangents(cosine, sine, pull, curvature, pull - curvature[:, None] * point)


def _length(cosines: Any, coefficients: Any) -> Any:
    xp = cosines.__array_namespace__()
    return xp.clip(xp.einsum("um,umn,un->u", coefficients, cosines, coefficients), 0, None) ** 0.5
