"""Softmax attention: a plain version, and for TPU the Pallas splash kernel, which never stores all scores at once.

Axis letters: B batch, S query tokens, T keys, H heads, G key-value heads, K head size.
"""

import dataclasses
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SharedPrompt:
    """Layout of rows that hold a prompt of P tokens and its k completions of N tokens each, P + k N tokens in all.

    A completion sees the prompt and itself. So the prompt is computed once for all of its completions.
    """

    prompt: int  # P
    copies: int  # k

    def split(self, rows: Array) -> tuple[Array, Array]:
        """Prompts [R, P, ...] and completions [R k, N, ...] of rows [R, P + k N, ...]."""
        prompts, completions = rows[:, : self.prompt], rows[:, self.prompt :]
        shape = len(rows) * self.copies, completions.shape[1] // self.copies, *rows.shape[2:]
        return prompts, completions.reshape(shape)

    def join(self, prompts: Array, completions: Array) -> Array:
        """The inverse of `split`."""
        own = completions.reshape(len(prompts), -1, *completions.shape[2:])
        return jnp.concatenate([prompts, own], axis=1)

    def repeat(self, prompts: Array) -> Array:
        """The prompt of each completion: [R, ...] -> [R k, ...]."""
        return jnp.repeat(prompts, self.copies, axis=0)


class Positions(NamedTuple):
    """Positions of the queries and keys: query [B, S], key [B, T]; key_valid: bool [B, T], True = real token."""

    query: Array
    key: Array
    key_valid: Array
    shared: SharedPrompt | None = None  # layout of the rows; None: each row is one sequence


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
        key: [B, G, T, K].
        value: [B, G, K, T].
        positions: a query sees the valid keys at its own position and before.
        local: bool []; if True, a query sees only the last `window` of these, itself included. None: no layer is local.
        window: number of tokens.
        softcap: scores become softcap * tanh(score / softcap); 0 = unchanged.
        mesh: on TPUs, sequences of a supported shape use the splash kernel, for which the queries must be the last S of
            the T tokens; None = never.
    """
    if not splash_fits(query, key, mesh):
        return plain(query, key, value, visible(positions, local, window), softcap)
    assert mesh is not None
    kernel = functools.partial(splash, query, key, value, positions.key_valid, softcap=softcap, mesh=mesh)
    if local is None:
        return kernel(window=0)
    return jax.lax.cond(local, lambda: kernel(window=window), lambda: kernel(window=0))


def attend_shared(query: Array, key: Array, value: Array, positions: Positions, **options: Any) -> Array:
    """`attend` in rows of the layout `positions.shared`: query [R, S, H, K], key, value [R, S, G, K], S = P + k N."""
    shared = positions.shared
    assert shared is not None
    queries = zip(shared.split(query), shared.split(positions.query), strict=True)
    parts = [shared.split(x) for x in (key, value, positions.key, positions.key_valid)]
    of_prompts = [prompt for prompt, _ in parts]
    of_completions = [jnp.concatenate([shared.repeat(prompt), own], axis=1) for prompt, own in parts]
    mixed = []
    for (q, at), (k, v, k_at, valid) in zip(queries, (of_prompts, of_completions), strict=True):
        seen = Positions(at, k_at, valid)
        mixed.append(attend(q, k.swapaxes(1, 2), jnp.transpose(v, (0, 2, 3, 1)), seen, **options))
    return shared.join(*mixed)


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
    """True on TPUs, for several queries in bfloat16, with a head size and head counts that the kernel supports.

    Not for float32, whose factors the kernel would round to bfloat16.
    """
    if mesh is None or mesh.devices.flat[0].platform != "tpu" or query.dtype != jnp.bfloat16:
        return False
    groups, tensor = key.shape[1], mesh.shape["tensor"]
    whole_heads = query.shape[2] % tensor == 0 and (groups % tensor == 0 or groups == 1)
    whole_rows = bool(meshes.manual_axes()) or query.shape[0] % meshes.batch_devices(mesh) == 0
    return query.shape[1] > 1 and query.shape[3] % LANES == 0 and whole_heads and whole_rows


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
    """Attention by the splash kernel, each chip for its rows and heads. Queries: scaled, of the last S of T tokens.

    valid: bool [B, T], True = real token. The real tokens of a row must be contiguous: the kernel measures distances in
    columns. window: tokens that a query can see, itself included; 0 = all before it. interpret: run without a TPU.
    """
    length, keys = query.shape[1], key.shape[2]
    heads_first = query.swapaxes(1, 2), key, value.swapaxes(2, 3)
    query, key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0))) for x in heads_first)
    segments = [
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES))).astype(jnp.int32) for x in (valid[:, keys - length :], valid)
    ]
    key_axis = "tensor" if key.shape[1] % mesh.shape["tensor"] == 0 else None
    query_spec, key_spec = (PartitionSpec(meshes.BATCH, axis, None, None) for axis in ("tensor", key_axis))
    segments_spec = PartitionSpec(meshes.BATCH, None)
    in_specs = (query_spec, key_spec, key_spec, [segments_spec, segments_spec])

    def on_chip(query: Array, key: Array, value: Array, segments: list[Array]) -> Array:
        shape = query.shape[2], key.shape[2]
        attention = _kernel(query.shape[1], shape, keys - length, window, softcap=softcap, interpret=interpret)
        return jax.vmap(attention)(query, key, value, splash_attention.SegmentIds(*segments))

    on_all_chips = meshes.map_shards(on_chip, mesh, in_specs, query_spec)
    return on_all_chips(query, key, value, segments).swapaxes(1, 2)[:, :length]


def _kernel(heads: int, shape: tuple[int, int], offset: int, window: int, *, softcap: float, interpret: bool) -> Any:
    """The kernel of one row; shape: numbers of queries and keys, offset: column of the first query among the keys."""
    before = window - 1 if window else None  # None: all
    mask = splash_attention.LocalMask(shape, (before, 0), offset)
    sizes = [max(size for size in (LANES, 2 * LANES, 4 * LANES) if length % size == 0) for length in shape]
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": sizes[name.startswith("kv")] for name in names}
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
