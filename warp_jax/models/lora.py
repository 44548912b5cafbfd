"""LoRA (arXiv 2106.09685): a kernel changes by a product of two small factors, W = start + alpha / rank * A B.

A run trains the factors alone. Everything else sees W, since the mean of A B over policies is not mean(A) mean(B).
Factors hang below their kernel: A [L, *inputs, rank] is 'layers/attention/q/kernel/a', B [L, rank, *outputs] is
'layers/attention/q/kernel/b', without L where layers are not stacked.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from warp_jax import naming
from warp_jax.types import Array, Params


def init(key: Array, start: Params, rank: int) -> Params:
    """Factors of every leaf of `start`: A ~ N(0, 1 / inputs) and B = 0, so that the first policy equals `start`."""
    factors = {}
    for number, (name, kernel) in enumerate(sorted(flatten_dict(start, sep="/").items())):
        axes = naming.is_stacked(name) + naming.num_inputs(name)  # those of A, except the rank
        stack, inputs, outputs = kernel.shape[: naming.is_stacked(name)], kernel.shape[:axes], kernel.shape[axes:]
        noise = jax.random.normal(jax.random.fold_in(key, number), (*inputs, rank), kernel.dtype)
        factors[f"{name}/a"] = noise * math.prod(inputs[len(stack) :]) ** -0.5
        factors[f"{name}/b"] = jnp.zeros((*stack, rank, *outputs), kernel.dtype)
    return unflatten_dict(factors, sep="/")


def expand(start: Params, factors: Params, alpha: float) -> Params:
    """The weights start + alpha / rank * A B of the leaves with factors. Products are in full precision on any chip.

    start: a tree that holds these leaves.
    """
    kernels, leaves = flatten_dict(start, sep="/"), flatten_dict(factors, sep="/")
    product = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    weights = {}
    for name in sorted({factor.rpartition("/")[0] for factor in leaves}):
        a, b = leaves[f"{name}/a"], leaves[f"{name}/b"]
        change = (jax.vmap(product) if naming.is_stacked(name) else product)(a, b)
        weights[name] = kernels[name] + alpha / a.shape[-1] * change
    return unflatten_dict(weights, sep="/")


def refactor(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors [outputs, rank], [rank, inputs] whose product is nearest to a matrix, in the Frobenius norm.

    Both get the root of each singular value. Ranks beyond the smaller side of the matrix are 0.
    """
    left, values, right = np.linalg.svd(change, full_matrices=False)
    root, spare = np.sqrt(values[:rank]), max(rank - len(values), 0)
    outer, inner = left[:, :rank] * root, root[:, None] * right[:rank]
    return np.pad(outer, ((0, 0), (0, spare))), np.pad(inner, ((0, spare), (0, 0)))
