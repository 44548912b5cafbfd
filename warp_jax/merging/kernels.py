"""The two passes of a merge over one leaf: inner products of the task vectors, then a weighted sum.

Both compute in float64 and round once, at the end. Float32 is not enough for task vectors at almost 180 degrees: the
terms of the sum are 57 times longer than the sum, and a float32 cosine gives the angle with a relative error of 1e-4.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from warp_jax.merging import rounding
from warp_jax.types import Array, HostOrDevice

# On a CPU, products are summed elementwise in blocks that stay in the cache. Without blocks, XLA writes the float64
# differences of a whole leaf to memory before it sums them, which takes ten times as long. Two products at a time are
# stored as one complex number, because XLA makes one loop per array of sums.
BLOCK = 1 << 15  # elements
BLOCKS_AT_ONCE = 4  # blocks per step of the loop


def gram(init: HostOrDevice, policies: Sequence[HostOrDevice], *, layer_axis: int | None) -> Array:
    """Inner products <policy_a - init, policy_b - init>: float64 [M, M], or [L, M, M] if the leaf has a layer_axis.

    layer_axis: the axis of the leaf that runs over L layers; None if the leaf is not stacked.
    """
    with jax.enable_x64(True):
        leaves = [jnp.asarray(x) for x in (init, *policies)]
        one_cpu = all(_is_on_one_cpu(x) for x in leaves)
        sum_up = _blocked_gram if one_cpu else _plain_gram
        matrix = sum_up(leaves[0], tuple(leaves[1:]), layer_axis=layer_axis)
        return matrix[0] if layer_axis is None else matrix


def weighted_sum(
    init: HostOrDevice,
    policies: Sequence[HostOrDevice],
    weights: Array,
    *,
    donate: bool,
    rounding_key: Array | None = None,
) -> Array:
    """Compute weights[..., 0] * init + sum_m weights[..., m] * (policy_m - init).

    The result has the dtype of the first policy; with a rounding_key, it is rounded stochastically. weights: float64
    [1 + M]; or [L, 1 + M], [1, L, 1 + M], ... for a leaf whose first, second, ... axis runs over L layers. donate:
    write over the first policy, whose array then cannot be used.
    """
    with jax.enable_x64(True):
        first, *rest = (jnp.asarray(x) for x in policies)
        mix = _mix_in_place if donate else _mix
        return mix(first, tuple(rest), jnp.asarray(init), weights, rounding_key)


@functools.partial(jax.jit, static_argnames="layer_axis")
def _plain_gram(init: Array, policies: tuple[Array, ...], *, layer_axis: int | None) -> Array:
    """Sum over whole axes, so that each device sums its own shard."""
    axes = tuple(axis for axis in range(init.ndim) if axis != layer_axis)
    deltas = [_wide(x) - _wide(init) for x in policies]
    return _symmetric([jnp.sum(p, axis=axes).reshape(-1) for p in _products(deltas)], len(policies))


@functools.partial(jax.jit, static_argnames="layer_axis")
def _blocked_gram(init: Array, policies: tuple[Array, ...], *, layer_axis: int | None) -> Array:
    """Sum in blocks. on_disk does this in numpy, which starts faster but takes 1.2 times the processor time."""
    rows = 1 if layer_axis is None else init.shape[layer_axis]
    layers_first = [x if layer_axis is None else jnp.moveaxis(x, layer_axis, 0) for x in (init, *policies)]
    flat = [x.reshape(-1) for x in layers_first]
    size = init.size // rows
    step = BLOCK * BLOCKS_AT_ONCE
    num_steps, tail = divmod(size, step)

    def products(start: Array, length: int) -> list[Array]:
        first, *parts = (_wide(lax.dynamic_slice(x, (start,), (length,))) for x in flat)
        return _pack(_products([part - first for part in parts]))

    def row_sums(row: Array) -> Array:
        def add_step(k: Array, totals: list[Array]) -> list[Array]:
            for b in range(BLOCKS_AT_ONCE):
                new = products(row * size + k * step + b * BLOCK, BLOCK)
                totals = [total + n for total, n in zip(totals, new, strict=True)]
            return totals

        sums = [p.sum() for p in products(row * size + num_steps * step, tail)]
        if num_steps:
            totals = lax.fori_loop(0, num_steps, add_step, [jnp.zeros(BLOCK, s.dtype) for s in sums])
            sums = [s + total.sum() for s, total in zip(sums, totals, strict=True)]
        return jnp.stack(_unpack(sums))

    return _symmetric(list(lax.map(row_sums, jnp.arange(rows)).T), len(policies))


def _mix_leaf(first: Array, rest: tuple[Array, ...], init: Array, weights: Array, rounding_key: Array | None) -> Array:
    def weight(m: int) -> Array:
        return weights[..., m].reshape(weights.shape[:-1] + (1,) * (init.ndim + 1 - weights.ndim))

    start = _wide(init)
    mixed = weight(0) * start
    for m, policy in enumerate((first, *rest), start=1):
        mixed = mixed + weight(m) * (_wide(policy) - start)
    if rounding_key is None:
        return mixed.astype(first.dtype)
    bits = jax.random.bits(rounding_key, mixed.shape, jnp.uint32)  # 64 bits fail inside a jit that has 32-bit types
    return rounding.stochastic(mixed, first.dtype, _wide(bits) * 2.0**-32)


_mix = jax.jit(_mix_leaf)
_mix_in_place = jax.jit(_mix_leaf, donate_argnums=0)


def _products(deltas: Sequence[Array]) -> list[Array]:
    """M (M + 1) / 2 elementwise products of pairs: the lower triangle, row by row."""
    return [a * b for i, a in enumerate(deltas) for b in deltas[: i + 1]]


def _pack(products: Sequence[Array]) -> list[Array]:
    """Join pairs of real arrays to complex arrays; a last array without a partner stays real."""
    pairs = [lax.complex(a, b) for a, b in zip(products[::2], products[1::2], strict=False)]
    return pairs + list(products[2 * len(pairs) :])


def _unpack(packed: Sequence[Array]) -> list[Array]:
    return [part for x in packed for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]


def _symmetric(sums: Sequence[Array], count: int) -> Array:
    """Turn the lower triangle, a list of [L] arrays, into symmetric matrices [L, M, M]."""
    place = {(a, b): a * (a + 1) // 2 + b for a in range(count) for b in range(a + 1)}
    rows = [jnp.stack([sums[place[max(a, b), min(a, b)]] for b in range(count)], -1) for a in range(count)]
    return jnp.stack(rows, -2)


def _is_on_one_cpu(x: Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and [device.platform for device in x.devices()] == ["cpu"]


def _wide(x: Array) -> Array:
    return x.astype(jnp.float64)
