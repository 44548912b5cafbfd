"""Softmax attention: a plain version, and for TPU the Pallas splash kernel, which never stores all scores at once.

Axis letters: B batch, S query tokens, T keys, H heads, G key-value heads, K head size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, PartitionSpec

from warp_jax.parallel import meshes
from warp_jax.types import Array

MASKED = -1e30  # score of a masked key; finite, so that a row without any visible key gives no NaN
LANES = 128  # width of a TPU's vector unit: the kernel needs lengths and head sizes that are multiples of it


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Precision for products of factors of this dtype: without it, a TPU rounds float32 factors to bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Positions(NamedTuple):
    """Positions of the queries and keys: query [B, S], key [B, T]; key_valid: bool [B, T], True = real token."""

    query: Array
    key: Array
    key_valid: Array


def attend(
    query: Array,
    key: Array,
    value: Array,
    positions: Positions,
    *,
    local: Array | None,
    window: int,
    softcap: float,
    mesh: Mesh | None,
) -> Array:
    """Mean of the values that each query can see, weighted by the softmax of its scores: [B, S, H, K].

    Args:
        query: [B, S, H, K], scaled already.
        key: [B, T, G, K].
        value: [B, T, G, K].
        positions: a query sees the valid keys at its own position and before.
        local: bool []; if True, a query sees only the last `window` of these, itself included. None: no layer is local.
        window: number of tokens.
        softcap: scores become softcap * tanh(score / softcap); 0 = unchanged.
        mesh: on TPUs, whole sequences of a supported shape use the splash kernel.
    """
    if not splash_fits(query, key, mesh):
        return plain(query, key, value, visible(positions, local, window), softcap)
    assert mesh is not None
    kernel = functools.partial(splash, query, key, value, positions.key_valid, softcap=softcap, mesh=mesh)
    if local is None:
        return kernel(window=0)
    return jax.lax.cond(local, lambda: kernel(window=window), lambda: kernel(window=0))


def visible(positions: Positions, local: Array | None, window: int) -> Array:
    """Mask bool [B, S, T]: the key is a real token, not after the query, and in a local layer inside the window."""
    distance = positions.query[:, :, None] - positions.key[:, None, :]
    mask = positions.key_valid[:, None, :] & (distance >= 0)
    return mask if local is None else mask & (~local | (distance < window))


def plain(query: Array, key: Array, value: Array, mask: Array, softcap: float) -> Array:
    """Attention of queries that are scaled already, with all scores in memory; mask: bool [B, S, T]."""
    grouped = query.reshape(*query.shape[:2], key.shape[1], -1, query.shape[3])
    exact = precision(query.dtype)
    scores = jnp.einsum("bsgqk,bgtk->bgqst", grouped, key, precision=exact, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgqst,bgkt->bsgqk", weights, value, precision=exact).reshape(query.shape)


def splash_fits(query: Array, key: Array, mesh: Mesh | None) -> bool:
    """True on TPUs, for whole bfloat16 sequences (no cache) with a head size and head counts that the kernel supports.

    Not for float32, whose factors the kernel would round to bfloat16.
    """
    if mesh is None or mesh.devices.flat[0].platform != "tpu" or query.dtype != jnp.bfloat16:
        return False
    groups, tensor = key.shape[1], mesh.shape["tensor"]
    whole_heads = query.shape[2] % tensor == 0 and (groups % tensor == 0 or groups == 1)
    whole_rows = query.shape[0] % meshes.batch_devices(mesh) == 0
    return query.shape[1] == key.shape[2] > 1 and query.shape[3] % LANES == 0 and whole_heads and whole_rows


def splash(
    query: Array,
    key: Array,
    value: Array,
    valid: Array,
    *,
    window: int,
    softcap: float,
    mesh: Mesh,
    interpret: bool = False,
) -> Array:
    """Attention by the splash kernel, for whole sequences and scaled queries; each chip computes its rows and heads.

    valid: bool [B, S], True = real token. The real tokens of a row must be contiguous: the kernel measures distances in
    columns. window: tokens that a query can see, itself included; 0 = all before it. interpret: run without a TPU.
    """
    length = query.shape[1]
    padding = -length % LANES
    heads_first = query.swapaxes(1, 2), key, value.swapaxes(2, 3)
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in heads_first)
    segments = jnp.pad(valid, ((0, 0), (0, padding))).astype(jnp.int32)
    key_axis = "tensor" if key.shape[1] % mesh.shape["tensor"] == 0 else None
    query_spec, key_spec = (PartitionSpec(meshes.BATCH, axis, None, None) for axis in ("tensor", key_axis))
    in_specs = (query_spec, key_spec, key_spec, PartitionSpec(meshes.BATCH, None))

    def on_chip(query: Array, key: Array, value: Array, segments: Array) -> Array:
        attention = _kernel(query.shape[1], length + padding, window, softcap, interpret)
        return jax.vmap(attention)(query, key, value, splash_attention.SegmentIds(segments, segments))

    on_all_chips = jax.shard_map(on_chip, mesh=mesh, in_specs=in_specs, out_specs=query_spec, check_vma=False)
    return on_all_chips(query, key, value, segments).swapaxes(1, 2)[:, :length]


def _kernel(heads: int, length: int, window: int, softcap: float, interpret: bool) -> Any:
    shape = (length, length)
    mask = splash_attention.LocalMask(shape, (window - 1, 0), 0) if window else splash_attention.CausalMask(shape)
    block = max(size for size in (LANES, 2 * LANES, 4 * LANES) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
