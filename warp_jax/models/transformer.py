"""A decoder-only transformer whose settings cover Gemma 1-3, Llama, SmolLM2, Qwen 2.5/3 and Mistral.

Axis letters: B batch, S query tokens, T cached keys, V vocabulary, D width, H heads, G key-value heads, K head size,
F mlp width, L layers. Layers are stacked and scanned: each parameter below `layers` has a leading axis L. With several
`layer_groups`, each group is its own stack, `layers_from_I`, where I is its first layer.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from warp_jax.models import attention, rope
from warp_jax.parallel import meshes
from warp_jax.types import Array, States

NO_SCALING = rope.RopeScaling()
REMAT: dict[str, Any] = {  # policies of jax.checkpoint: which values of a layer are kept for the gradient
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Settings of the architecture."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to every norm's scale (Gemma: 1)
    post_norms: bool = False  # norms after attention and mlp too (Gemma 2, 3)
    qk_norm: bool = False
    qkv_bias: bool = False
    query_scale: float = 0.0  # factor on the queries; 0 = head_dim ** -0.5
    attention_softcap: float = 0.0  # bound of the attention scores; 0 = none
    final_softcap: float = 0.0  # bound of the logits; 0 = none
    scale_embedding: bool = False
    tied_head: bool = True
    rope_theta: float = 10_000.0
    rope_theta_local: float = 0.0  # theta of local layers, without scaling; 0 = the same as the other layers
    rope_scaling: rope.RopeScaling = NO_SCALING
    local_pattern: tuple[bool, ...] = (False,)  # repeated over the layers; True = local: sees the sliding window only
    sliding_window: int = 0  # tokens that a local layer sees
    head: str = "language"  # logits over the vocabulary; "scalar": one number per token (reward model)
    layer_groups: tuple[int, ...] = ()  # layers in each stack, so that some can be frozen; () = one stack
    dtype: str = "float32"  # of activations; parameters are always float32
    remat: str = "none"  # recompute layers in the backward pass: "none", "dots" (all but matrix products), "full"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads: got {self.num_heads}, want a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, want an even number (rotary embeddings need pairs)")
        if any(self.local_pattern) and self.sliding_window < 1:
            raise ValueError(f"sliding_window: got {self.sliding_window} with local layers, want at least 1 token")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation: got {self.activation!r}, want one of {', '.join(_ACTIVATIONS)}")
        if self.head not in ("language", "scalar"):
            raise ValueError(f"head: got {self.head!r}, want 'language' or 'scalar'")
        if self.remat not in REMAT:
            raise ValueError(f"remat: got {self.remat!r}, want one of {', '.join(REMAT)}")
        if self.layer_groups and sum(self.layer_groups) != self.num_layers:
            raise ValueError(
                f"layer_groups: got {self.layer_groups}, sum {sum(self.layer_groups)}, want sum {self.num_layers}"
            )

    @property
    def is_local(self) -> tuple[bool, ...]:
        """One flag per layer: True = it sees the sliding window only."""
        return tuple(self.local_pattern[i % len(self.local_pattern)] for i in range(self.num_layers))

    @property
    def stacks(self) -> tuple[tuple[str, int, int], ...]:
        """(name, first layer, last layer + 1) of each stack of layers."""
        if len(self.layer_groups) < 2:
            return (("layers", 0, self.num_layers),)
        bounds = itertools.accumulate(self.layer_groups, initial=0)
        return tuple((f"layers_from_{first}", first, end) for first, end in itertools.pairwise(bounds))


# Sharding of activations: rows over the batch axes, heads and vocabulary over `tensor`.
ROWS = PartitionSpec(meshes.BATCH, None, None)
HEADS = PartitionSpec(meshes.BATCH, None, "tensor", None)
LOGITS = PartitionSpec(meshes.BATCH, None, "tensor")
CACHE = PartitionSpec(None, meshes.BATCH, "tensor", None, None)


class Cache(NamedTuple):
    """Keys and values of the tokens so far; T is the capacity."""

    keys: Array  # [L, B, G, T, K]
    values: Array  # [L, B, G, K, T]
    positions: Array  # int32 [B, T]
    valid: Array  # bool [B, T], True = real token
    length: Array  # int32 [], column of the next token in every row (prompts are left-padded)

    def repeat(self, copies: int) -> "Cache":
        """Repeat each row; copies of a row are neighbours."""
        keys, values = (jnp.repeat(x, copies, axis=1) for x in (self.keys, self.values))
        positions, valid = (jnp.repeat(x, copies, axis=0) for x in (self.positions, self.valid))
        return Cache(keys, values, positions, valid, self.length)

    def take(self, rows: Array) -> "Cache":
        """Some rows, in this order: int32 [R]."""
        return Cache(self.keys[:, rows], self.values[:, rows], self.positions[rows], self.valid[rows], self.length)

    def widen(self, capacity: int) -> "Cache":
        """Room for more tokens: `capacity` columns, of which the new ones are empty."""
        keys, values, positions, valid = (
            jnp.pad(x, [(0, capacity - x.shape[axis] if axis == columns else 0) for axis in range(x.ndim)])
            for x, columns in ((self.keys, 3), (self.values, 4), (self.positions, 1), (self.valid, 1))
        )
        return Cache(keys, values, positions, valid, self.length)

    def insert(self, rows: Array, other: "Cache", columns: Array) -> "Cache":
        """Put the R rows of `other`, P columns long, into rows [R] and columns [P]; empty the other columns of these.

        A row number outside the cache is left out.
        """
        at = rows[:, None], columns[None]

        def put(old: Array, new: Array) -> Array:
            return old.at[at].set(new, mode="drop")

        return Cache(
            keys=self.keys.at[:, at[0], :, at[1]].set(jnp.transpose(other.keys, (1, 3, 0, 2, 4)), mode="drop"),
            values=self.values.at[:, at[0], :, :, at[1]].set(jnp.transpose(other.values, (1, 4, 0, 2, 3)), mode="drop"),
            positions=put(self.positions, other.positions),
            valid=put(self.valid.at[rows].set(False, mode="drop"), other.valid),
            length=self.length,
        )

    def at(self, column: Array) -> "Cache":
        """The same cache, in which the next token of every row goes to this column."""
        return self._replace(length=column)


def init_cache(config: TransformerConfig, batch: int, capacity: int, mesh: Mesh | None = None) -> Cache:
    """An empty cache for `capacity` tokens per row; with a mesh, rows and heads are sharded."""
    heads = config.num_layers, batch, config.num_kv_heads
    shapes = (*heads, capacity, config.head_dim), (*heads, config.head_dim, capacity)
    keys, values = (meshes.constrain(jnp.zeros(shape, config.dtype), mesh, CACHE) for shape in shapes)
    positions, valid = (jnp.zeros((batch, capacity), dtype) for dtype in (jnp.int32, bool))
    return Cache(keys, values, positions, valid, length=jnp.zeros((), jnp.int32))


_ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
}


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis, in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        initial = nn.initializers.constant(1.0 - self.config.norm_offset)
        scale = self.param("scale", initial, (x.shape[-1],)) + self.config.norm_offset
        wide = x.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.config.norm_eps)
        return (wide / rms * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


class Linear(nn.Module):
    """x [B, S, *inputs] times a kernel [*inputs, *outputs], plus a bias [*outputs] with `use_bias`.

    Factors are rounded to `dtype`; the product has `product_dtype`, by default the same.
    B and S are merged into one axis: otherwise XLA's gradient on a CPU takes twice as long.
    """

    outputs: tuple[int, ...]
    dtype: str
    num_input_axes: int = 1
    use_bias: bool = False
    initializer: Any = None
    product_dtype: str = ""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs = x.shape[-self.num_input_axes :]
        initial = self.initializer or nn.initializers.lecun_normal(
            in_axis=range(len(inputs)), out_axis=range(len(inputs), len(inputs) + len(self.outputs))
        )
        kernel = self.param("kernel", initial, (*inputs, *self.outputs)).astype(self.dtype)
        rows = x.reshape(-1, math.prod(inputs)).astype(self.dtype)
        product = _multiply(rows, kernel.reshape(math.prod(inputs), -1), self.product_dtype or self.dtype)
        result = product.reshape(*x.shape[:2], *self.outputs)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.outputs).astype(self.dtype)
            result = result + bias.reshape((1, 1, *self.outputs))
        return result


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: TransformerConfig
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self, x: Array, cache: Cache | None, layer: Array, local: Array, positions: attention.Positions
    ) -> tuple[Array, Any]:
        cfg = self.config
        query = self._project("q", cfg.num_heads, x)
        key = self._project("k", cfg.num_kv_heads, x)
        value = self._project("v", cfg.num_kv_heads, x)
        if cfg.qk_norm:
            query, key = RMSNorm(cfg, name="q_norm")(query), RMSNorm(cfg, name="k_norm")(key)
        frequencies, scale = _rotary(cfg, local)
        query = rope.rotate(query, positions.query, frequencies, scale) * (cfg.query_scale or cfg.head_dim**-0.5)
        key = rope.rotate(key, positions.query, frequencies, scale)
        has_room = cache is not None and cache.keys.shape[3] > x.shape[1]  # for later tokens
        options: dict[str, Any] = {
            "local": local if any(cfg.local_pattern) else None,
            "window": cfg.sliding_window,
            "softcap": cfg.attention_softcap,
            "mesh": None if has_room else self.mesh,
        }
        if positions.shared is not None:
            mixed = attention.attend_shared(query, key, value, positions, **options)
        else:
            key, value = key.swapaxes(1, 2), jnp.transpose(value, (0, 2, 3, 1))
            if cache is not None:
                cache = _write(cache, layer, key, value)
                key = jax.lax.dynamic_index_in_dim(cache.keys, layer, keepdims=False)
                value = jax.lax.dynamic_index_in_dim(cache.values, layer, keepdims=False)
            mixed = attention.attend(query, key, value, positions, **options)
        return Linear((cfg.width,), cfg.dtype, num_input_axes=2, name="o")(mixed), cache

    def _project(self, name: str, heads: int, x: Array) -> Array:
        cfg = self.config
        projected = Linear((heads, cfg.head_dim), cfg.dtype, use_bias=cfg.qkv_bias, name=name)(x)
        return meshes.constrain(projected, self.mesh, HEADS)


class Mlp(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        gate = Linear((cfg.mlp_dim,), cfg.dtype, name="gate")(x)
        up = Linear((cfg.mlp_dim,), cfg.dtype, name="up")(x)
        return Linear((cfg.width,), cfg.dtype, name="down")(_ACTIVATIONS[cfg.activation](gate) * up)


class Layer(nn.Module):
    """Attention and mlp, each with a norm before it, a residual, and with `post_norms` a norm after it."""

    config: TransformerConfig
    mesh: Mesh | None

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Any], layer_and_local: tuple[Array, Array], positions: attention.Positions
    ) -> tuple[Any, None]:
        x, cache = carry
        layer, local = layer_and_local
        cfg = self.config
        mixed, cache = Attention(cfg, self.mesh, name="attention")(
            RMSNorm(cfg, name="attention_norm")(x), cache, layer, local, positions
        )
        x = x + (RMSNorm(cfg, name="attention_post_norm")(mixed) if cfg.post_norms else mixed)
        fed = Mlp(cfg, name="mlp")(RMSNorm(cfg, name="mlp_norm")(x))
        x = x + (RMSNorm(cfg, name="mlp_post_norm")(fed) if cfg.post_norms else fed)
        return (meshes.constrain(x, self.mesh, ROWS), cache), None


class Transformer(nn.Module):
    """Map token ids to logits, or with a scalar head to one number per token.

    Call arguments: token_ids int32 [B, S]; mask bool [B, S], True = real token; cache, to which the tokens are
    appended (None: they are the whole sequence); num_outputs > 0: outputs of the last num_outputs tokens only.
    `hidden` takes rows of several sequences too, without a cache: see `attention.SharedPrompt`.
    Returns (float32 [B, S, V], or [B, S] with a scalar head; the new cache). With a mesh, activations are sharded.
    """

    config: TransformerConfig
    mesh: Mesh | None = None

    def setup(self) -> None:
        cfg = self.config
        self.embed = nn.Embed(cfg.vocab_size, cfg.width, dtype=cfg.dtype, embedding_init=nn.initializers.normal(0.02))
        layer = Layer if cfg.remat == "none" else nn.remat(Layer, prevent_cse=False, policy=REMAT[cfg.remat])
        for name, first, end in cfg.stacks:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=end - first,
            )
            setattr(self, name, stack(cfg, self.mesh))
        self.final_norm = RMSNorm(cfg)
        if cfg.head == "scalar":
            self.score = Linear((1,), "float32", initializer=nn.initializers.zeros)
        elif not cfg.tied_head:
            self.lm_head = Linear((cfg.vocab_size,), cfg.dtype, product_dtype="float32")

    def __call__(
        self, token_ids: Array, mask: Array, cache: Cache | None = None, num_outputs: int = 0
    ) -> tuple[Array, Cache | None]:
        x, cache = self.hidden(token_ids, mask, cache, num_outputs)
        return self.head(x), cache

    def hidden(
        self,
        token_ids: Array,
        mask: Array,
        cache: Cache | None = None,
        num_outputs: int = 0,
        shared: attention.SharedPrompt | None = None,
    ) -> tuple[Array, Cache | None]:
        """Normalised states of the last layer [B, S, D], the input of `head`, and the cache; arguments as in a call.

        shared: the layout of rows that hold a prompt and its completions.
        """
        positions, cache = _count_tokens(mask, cache) if shared is None else (_count_shared(mask, shared), None)
        x, cache = self._run(self._embedded(token_ids), cache, positions, 0, self.config.num_layers)
        return self.final_norm(x[:, -num_outputs:]), cache

    def states(
        self, token_ids: Array, mask: Array, cache: Cache | None = None, trunk_layers: int = 0
    ) -> tuple[States, Cache | None]:
        """`States` of all tokens and the cache. trunk_layers: layers of the trunk, whole stacks."""
        positions, cache = _count_tokens(mask, cache)
        trunk, cache = self._run(self._embedded(token_ids), cache, positions, 0, trunk_layers)
        x, cache = self._run(trunk, cache, positions, trunk_layers, self.config.num_layers)
        return States(trunk if trunk_layers else None, self.final_norm(x)), cache

    def above(self, trunk: Array, mask: Array, trunk_layers: int, num_outputs: int = 0) -> Array:
        """Final hidden states [B, S, D], as from `hidden`, computed from `States.trunk` of whole sequences."""
        positions, _ = _count_tokens(mask, None)
        x, _ = self._run(trunk, None, positions, trunk_layers, self.config.num_layers)
        return self.final_norm(x[:, -num_outputs:])

    def _embedded(self, token_ids: Array) -> Array:
        cfg = self.config
        x = self.embed(token_ids)
        if cfg.scale_embedding:
            x = x * jnp.asarray(cfg.width**0.5, cfg.dtype)
        return meshes.constrain(x, self.mesh, ROWS)

    def _run(
        self, x: Array, cache: Cache | None, positions: attention.Positions, first: int, end: int
    ) -> tuple[Array, Cache | None]:
        """The stacks that hold layers first .. end - 1."""
        cfg = self.config
        for name, start, stop in cfg.stacks:
            if first <= start < end:
                layer_and_local = (jnp.arange(start, stop), jnp.array(cfg.is_local[start:stop]))
                (x, cache), _ = getattr(self, name)((x, cache), layer_and_local, positions)
        return x, cache

    def head(self, x: Array) -> Array:
        """Logits [B, S, V], or one number per token [B, S], from the states that `hidden` returns.

        Products are summed in float32, and logits are float32: in bfloat16 a logit is wrong by up to 0.4 %, which adds
        noise to every log-probability.
        """
        cfg = self.config
        if cfg.head == "scalar":
            return self.score(x)[..., 0]
        if cfg.tied_head:
            rows = _multiply(x.reshape(-1, cfg.width), self.embed.embedding.astype(cfg.dtype).T, "float32")
            logits = rows.reshape(*x.shape[:2], cfg.vocab_size)
        else:
            logits = self.lm_head(x)
        logits = meshes.constrain(logits, self.mesh, LOGITS)
        return cfg.final_softcap * jnp.tanh(logits / cfg.final_softcap) if cfg.final_softcap else logits


def _multiply(x: Array, kernel: Array, dtype: str) -> Array:
    """Matrix product x [R, I] @ kernel [I, O] with a result in `dtype`; a float32 result is summed in float32."""
    return jnp.matmul(x, kernel, precision=attention.precision(x.dtype), preferred_element_type=dtype)


def _count_tokens(mask: Array, cache: Cache | None) -> tuple[attention.Positions, Cache | None]:
    """Number the real tokens of each row from 0, or onwards from those in the cache, and add them to the cache."""
    before = 0 if cache is None else cache.valid.sum(axis=1, dtype=jnp.int32, keepdims=True)
    positions = jnp.maximum(before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    if cache is None:
        return attention.Positions(positions, positions, mask), None
    start = (0, cache.length)
    cache = cache._replace(
        positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
        valid=jax.lax.dynamic_update_slice(cache.valid, mask, start),
        length=cache.length + mask.shape[1],
    )
    return attention.Positions(positions, cache.positions, cache.valid), cache


def _count_shared(mask: Array, shared: attention.SharedPrompt) -> attention.Positions:
    """Number the real tokens of each prompt from 0, and those of its completions onwards from it."""
    prompts, completions = shared.split(mask)
    before = shared.repeat(prompts.sum(axis=1, dtype=jnp.int32, keepdims=True))
    first, rest = (jnp.cumsum(x, axis=1, dtype=jnp.int32) - 1 for x in (prompts, completions))
    positions = jnp.maximum(shared.join(first, before + rest), 0)
    return attention.Positions(positions, positions, mask, shared)


def _write(cache: Cache, layer: Array, key: Array, value: Array) -> Cache:
    """Store the newest keys and values of one layer. `length` includes them already (see `_count_tokens`)."""
    column = cache.length - key.shape[2]
    return cache._replace(
        keys=jax.lax.dynamic_update_slice(cache.keys, key[None].astype(cache.keys.dtype), (layer, 0, 0, column, 0)),
        values=jax.lax.dynamic_update_slice(
            cache.values, value[None].astype(cache.values.dtype), (layer, 0, 0, 0, column)
        ),
    )


def _rotary(cfg: TransformerConfig, local: Array) -> tuple[Array, Array | float]:
    """Rotary frequencies [K / 2] of a layer, and the factor on its rotated queries and keys; local: bool []."""
    frequencies = jnp.asarray(rope.inverse_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling))
    scale = rope.attention_scale(cfg.rope_scaling)
    if not (any(cfg.local_pattern) and cfg.rope_theta_local):
        return frequencies, scale
    local_frequencies = jnp.asarray(rope.inverse_frequencies(cfg.head_dim, cfg.rope_theta_local, NO_SCALING))
    return jnp.where(local, local_frequencies, frequencies), jnp.where(local, 1.0, scale)
