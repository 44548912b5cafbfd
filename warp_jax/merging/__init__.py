"""The weight averaging of WARP (arXiv 2406.16768) on any pytree of arrays: EMA, SLERP and LITI; and its relatives.

Every function is pure and jittable, keeps structure, dtype and sharding, and takes arrays in float32, bfloat16 or
float16. The EMA, which runs every step, is float32 inside. A merge, which runs once an iteration, is float64 inside
and rounds once, at the end; it reads the weights twice whatever M is:

    merged = init + liti_rate * sum_m c_m * (policy_m - init)        one c_m per unit, from `warp_jax.coefficients`

Options of the merges, all M >= 1 policies being trees shaped like init_params:
  liti_rate: 0 gives init_params, 1 (the default) the merge.
  weights: M - 1 for slerp, one for every policy after the first; M for lerp and task_arithmetic.
  unit: what shares one angle: "layer" (the paper), "tensor", "model", or a function leaf name -> unit name.
  stacked: the key below which leaves have the layers as their first axis, as `flax.linen.scan` lays them out
    ('layers/attn/q/kernel' of shape [L, ...]; 'layers/0/...' is not stacked); None if there are no such leaves.
  donate: the arrays of the first policy are given up and hold the result, which saves the memory and time of new ones.

Errors of the merges: ValueError for no policy, trees that differ (the first leaf is named), leaves that are not
floating-point arrays, wrong weights, and, outside jit, units whose task vectors are opposite or not finite.
"""

import importlib
from typing import TYPE_CHECKING, Any

from warp_jax.merging.coefficients import METHODS, angles, norms, slerp_coefficients

if TYPE_CHECKING:
    from warp_jax.merging.in_memory import (
        Gram,
        ema_update,
        gram,
        lerp,
        liti,
        merge,
        model_stock,
        slerp,
        slerp_full_weights,
        slerp_liti,
        symmetric_slerp,
        task_arithmetic,
        task_vector,
    )

__all__ = [
    "METHODS",
    "Gram",
    "angles",
    "ema_update",
    "gram",
    "lerp",
    "liti",
    "merge",
    "model_stock",
    "norms",
    "slerp",
    "slerp_coefficients",
    "slerp_full_weights",
    "slerp_liti",
    "symmetric_slerp",
    "task_arithmetic",
    "task_vector",
]


def __getattr__(name: str) -> Any:
    """Import on first use: merging checkpoints on disk (`warp_jax.merging.on_disk`) starts without JAX."""
    if name in __all__:
        return getattr(importlib.import_module("warp_jax.merging.in_memory"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
