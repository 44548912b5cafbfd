"""Softmax attention: a plain one, and on TPU the Pallas splash kernel, which never holds the scores of a sequence.

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

MASKED = -1e30  # finite, so that a row with no visible key stays finite
LANES = 128  # of a TPU's vector unit: the kernel takes lengths and head sizes that are multiples of it


class Seen(NamedTuple):
    """Which tokens ask and which can be seen: query_positions [B, S]; key_positions, key_valid [B, T]."""

    query_positions: Array
    key_positions: Array
    key_valid: Array


def attend(
    query: Array,
    key: Array,
    value: Array,
    seen: Seen,
    local: Array | None,
    *,
    window: int,
    scale: float,
    softcap: float,
    mesh: Mesh | None,
) -> Array:
    """Each query's mean of the values that it sees, weighted by softmax. query [B, S, H, K]; key, value [B, T, G, K].

    A query sees the real tokens that are not in its future; if `local` (bool [], None = never), the last `window` of
    these. softcap: 0 = none. On a TPU mesh, whole sequences that fit it go through the splash kernel.
    """
    query = query * scale
    if not splash_fits(query, key, mesh):
        return plain(query, key, value, visible(seen, local, window), softcap)
    assert mesh is not None
    kernel = functools.partial(splash, query, key, value, seen.key_valid, softcap=softcap, mesh=mesh)
    if local is None:
        return kernel(window=0)
    return jax.lax.cond(local, lambda: kernel(window=window), lambda: kernel(window=0))


def visible(seen: Seen, local: Array | None, window: int) -> Array:
    """Bool [B, S, T]: the key is a real token, not in the future, and inside the window of a local layer."""
    distance = seen.query_positions[:, :, None] - seen.key_positions[:, None, :]
    found = seen.key_valid[:, None, :] & (distance >= 0)
    return found if local is None else found & (~local | (distance < window))


def plain(query: Array, key: Array, value: Array, seen: Array, softcap: float) -> Array:
    """Attention of scaled queries with all scores in memory; seen: bool [B, S, T]."""
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("bsgqk,btgk->bgqst", query, key).astype(jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgqst,btgk->bsgqk", weights, value).reshape(batch, length, heads, size)


def splash_fits(query: Array, key: Array, mesh: Mesh | None) -> bool:
    """True for whole sequences on TPUs whose head size and head count the kernel takes."""
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return False
    groups, tensor = key.shape[2], mesh.shape["tensor"]
    whole_heads = query.shape[2] % tensor == 0 and (groups % tensor == 0 or groups == 1)
    whole_rows = query.shape[0] % meshes.batch_devices(mesh) == 0
    return query.shape[1] == key.shape[1] > 1 and query.shape[3] % LANES == 0 and whole_heads and whole_rows


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
    """Attention of scaled queries of whole sequences by the splash kernel, each chip its own rows and heads.

    valid: bool [B, S], real tokens. Places in the row stand for positions: padding is on one side only of the tokens
    that see each other. window: 0 = all of the past.
    """
    length = query.shape[1]
    spare = -length % LANES
    query, key, value = (jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0))) for x in (query, key, value))
    segments = jnp.pad(valid, ((0, 0), (0, spare))).astype(jnp.int32)
    share = "tensor" if key.shape[2] % mesh.shape["tensor"] == 0 else None
    batch = meshes.BATCH
    in_specs = (
        PartitionSpec(batch, None, "tensor", None),
        *[PartitionSpec(batch, None, share, None)] * 2,
        PartitionSpec(batch, None),
    )

    def on_chip(query: Array, key: Array, value: Array, segments: Array) -> Array:
        attention = _kernel(query.shape[2], length + spare, window, softcap, interpret)
        heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
        mixed = jax.vmap(attention)(*heads_first, splash_attention.SegmentIds(segments, segments))
        return mixed.swapaxes(1, 2)

    spread = jax.shard_map(on_chip, mesh=mesh, in_specs=in_specs, out_specs=in_specs[0], check_vma=False)
    return spread(query, key, value, segments)[:, :length]


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
