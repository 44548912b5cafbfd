"""Stochastic rounding, and the share of a displacement that survives rounding.

A merge computes in float64 and is rounded to the dtype of the result. Rounding to the nearest bfloat16 undoes most of a
small displacement: a weight changes only if its displacement is more than half of the distance to the next bfloat16,
2^-9 to 2^-8 of the weight. Stochastic rounding takes one of the two neighbours at random, with the exact mean.

The functions use the array library of their arguments (numpy or JAX), and numbers of any floating-point dtype.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import xxhash

METHODS = ("nearest", "stochastic")
TOLERANCE = 0.05  # warn if a delivered share is further than this from 1


class Delivery(NamedTuple):
    """Comparison of the written displacement with the exact one, which the merge asked for: sums over the elements."""

    asked_square: float  # <asked, asked>
    product: float  # <written, asked>
    error_square: float  # |written - asked|^2

    @property
    def share(self) -> float | None:
        """Projection of the written displacement on the asked one: 1 = all of it, 0 = nothing; None if asked is 0."""
        return self.product / self.asked_square if self.asked_square else None

    @property
    def relative_error(self) -> float | None:
        """Length of (written - asked) / length of asked."""
        return (self.error_square / self.asked_square) ** 0.5 if self.asked_square else None


def stochastic(x: Any, dtype: Any, uniforms: Any) -> Any:
    """Round float64 x to one of its two neighbours in dtype, so that the expectation is x.

    uniforms: random numbers in [0, 1), shaped like x. Numbers that dtype holds exactly, and numbers beyond its largest,
    are rounded to nearest.
    """
    xp = x.__array_namespace__()
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = x.astype(dtype)
        rest = x - nearest.astype(x.dtype)
        end = float(ml_dtypes.finfo(dtype).max)  # some dtypes of 8 bits have no infinity
        other = xp.nextafter(nearest, xp.where(rest > 0, end, -end).astype(dtype))
        gap = xp.abs(other.astype(x.dtype) - nearest.astype(x.dtype))
        takes_other = xp.isfinite(rest) & (rest != 0) & (uniforms * gap < xp.abs(rest))
    return xp.where(takes_other, other, nearest)


def uniforms(name: str, start: int, count: int, seed: int) -> np.ndarray:
    """Random numbers in [0, 1) for elements start .. start + count - 1 of a tensor: float64 [count].

    The number of an element depends only on (seed, name, index), so any cut into pieces gives the same result.
    """
    key = xxhash.xxh3_128_intdigest(f"{seed}/{name}".encode())
    first = start % 4  # Philox makes four numbers per step of its counter
    raw = np.random.Philox(key=key, counter=start // 4).random_raw(first + count)[first:]
    return (raw >> 11) * 2.0**-53


def measure(asked: np.ndarray, written: np.ndarray) -> Delivery:
    """Compare the exact displacement `asked` with the written one, float64 [N] each."""
    error = written - asked
    return Delivery(*map(float, (np.dot(asked, asked), np.dot(written, asked), np.dot(error, error))))


def warning(whole: Delivery, unit_shares: Mapping[str, float | None]) -> str:
    """Say in one line which units have a share further than TOLERANCE from 1; '' if none has.

    Without a displacement, as at eta 0, say whether rounding changes the weights.
    """
    if whole.share is None:
        return "rounding changes weights that should stay as they are" if whole.error_square else ""
    asked = {name: share for name, share in unit_shares.items() if share is not None}
    missed = [name for name, share in asked.items() if abs(share - 1) > TOLERANCE]
    if not missed:
        return ""
    worst = max(missed, key=lambda name: abs(asked[name] - 1))
    return (
        f"rounding delivers {whole.share:.0%} of the displacement from init ({len(missed)} of {len(asked)} units are "
        f"outside {1 - TOLERANCE:.0%} to {1 + TOLERANCE:.0%}, {worst} gets {asked[worst]:.0%})"
    )


def noise_square(values: np.ndarray) -> float:
    """Expected squared error of rounding to the dtype of the values, up to a factor of 2.

    Two neighbours are eps / 2 to eps of a value apart, and the error is uniform over this distance.
    """
    wide = values.astype(np.float64)
    eps = float(ml_dtypes.finfo(values.dtype).eps)
    return eps**2 / 24 * float(np.dot(wide, wide))
