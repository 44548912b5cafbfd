"""Weight averaging of WARP (arXiv 2406.16768) on any pytree of arrays: EMA, SLERP, LITI and related methods.

Every function is pure and jittable, keeps structure, dtype and sharding, and takes arrays in float32, bfloat16 or
float16. The EMA, which runs every step, computes in float32. A merge, which runs once per iteration, computes in
float64 and rounds once, at the end. It reads the weights twice, for any number M of policies:

    merged = init + liti_rate * sum_m c_m * (policy_m - init)        one c_m per unit, see `merging.coefficients`

All merges share these arguments:

Args:
  init_params: the weights where all policies started.
  policies: M >= 1 trees with the structure and shapes of init_params.
  liti_rate: 0 returns init_params, 1 (the default) the full merge. Or one rate for each unit, in the order of `gram`;
    or a function names of the units -> these, such as `lines(0.3, alpha=0.2)`, whose rate grows with depth.
  weights: slerp: M - 1, one for each policy after the first; karcher (with the sum 1), lerp and task_arithmetic: M.
  unit: the weights that share one angle: "layer" (as in the paper), "tensor", "model", or a function
    leaf name -> unit name.
  stacked: the key whose leaves hold all layers, as `flax.linen.scan` lays them out ('layers/attn/q/kernel' of shape
    [L, ...]; 'layers/0/...' is not stacked). None: no leaf is stacked.
  layer_axis: the axis of stacked leaves that runs over the layers, by default 0. All leaves of a stack must have the
    same length there.
  donate: write the result over the first policy, whose arrays then cannot be used. Saves memory and time.
  rounding_key: a `jax.random.key`, to round stochastically to the first policy's dtype: displacements smaller than the
    dtype's steps are kept in the mean. None: round to nearest, which undoes most of a small displacement in bfloat16.

Raises:
  ValueError: no policy; trees that differ (the message names the first leaf); leaves that are not floating-point
    arrays; a wrong number of weights or rates; outside jit, units whose task vectors are not finite, are opposite
    or cancel out.
"""

from etils import epy

from warp_jax.merging.coefficients import METHODS, angles, norms, slerp_coefficients

with epy.lazy_api_imports(globals()):  # on first use, so that `warp_jax.merging.on_disk` starts without JAX
    from warp_jax.merging.in_memory import (
        Gram,
        ema_update,
        gram,
        karcher,
        lerp,
        lines,
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
    "karcher",
    "lerp",
    "lines",
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
