"""The transformer and its rotary positions, against numbers by hand and against itself under other weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from warp_jax.models import attention, rope, transformer
from warp_jax.models.transformer import Linear, RMSNorm, Transformer, TransformerConfig, init_cache

PLAIN = TransformerConfig(
    vocab_size=11, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, rope_theta=50.0
)
GEMMA = {
    "activation": "gelu",
    "norm_offset": 1.0,
    "post_norms": True,
    "qk_norm": True,
    "attention_softcap": 4.0,
    "final_softcap": 3.0,
    "scale_embedding": True,
    "local_pattern": (True, False),
    "sliding_window": 3,
    "rope_theta_local": 20.0,
    "rope_scaling": rope.RopeScaling("yarn", 4.0, 16),
}
IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 10, 7]], np.int32)
MASK = np.array([[True] * 7, [False] * 2 + [True] * 5])


def make(seed=0, **settings):
    """A small config and random weights for it, norms and biases included."""
    config = dataclasses.replace(PLAIN, **settings)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), IDS, MASK)["params"]
    rng = np.random.default_rng(seed)
    return config, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, jnp.float32), shapes)


@functools.cache
def forward_fn(config, **kwargs):
    return jax.jit(lambda params, ids, mask: Transformer(config).apply({"params": params}, ids, mask, **kwargs)[0])


def run(config, params, ids=IDS, mask=MASK, **kwargs):
    """Outputs of one forward pass, as numpy."""
    return np.asarray(forward_fn(config, **kwargs)(params, jnp.asarray(ids), jnp.asarray(mask)))


def replaced(params, path, change):
    """The tree with `change` applied to the leaf at `path`."""
    key, _, rest = path.partition("/")
    return {**params, key: replaced(params[key], rest, change) if rest else change(params[key])}


def with_token(column, token):
    """IDS with one token of the first row changed."""
    changed = IDS.copy()
    changed[0, column] = token
    return changed


@pytest.mark.parametrize(("offset", "want"), [(0.0, [1.5, 0.5]), (1.0, [2.25, 1.5])])
def test_rms_norm_by_hand(offset, want):
    """Fails if the mean is a sum, eps is outside the root, or norm_offset is dropped: the root of 12.5 + 3.5 is 4."""
    norm = RMSNorm(dataclasses.replace(PLAIN, norm_eps=3.5, norm_offset=offset))
    got = norm.apply({"params": {"scale": jnp.array([2.0, 0.5])}}, jnp.array([[[3.0, 4.0]]]))
    assert_allclose(got, [[want]], rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_fresh_rms_norm_scales_by_one(offset):
    """Fails if the scale starts at 1 whatever the offset."""
    norm = RMSNorm(dataclasses.replace(PLAIN, norm_eps=3.5, norm_offset=offset))
    got, _ = norm.init_with_output(jax.random.key(0), jnp.array([[[3.0, 4.0]]]))
    assert_allclose(got, [[[0.75, 1.0]]], rtol=1e-6)


def test_linear_by_hand():
    """Fails if the bias is dropped or the kernel transposed."""
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([0.5, -0.5])}
    layer = Linear((2,), "float32", use_bias=True)
    assert_allclose(layer.apply({"params": params}, jnp.array([[[1.0, 2.0]]])), [[[7.5, 9.5]]])


def test_linear_over_heads():
    """Fails if head and head-size axes mix."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 4, 5)).astype("f"), rng.normal(size=(4, 5, 6, 7)).astype("f")
    got = Linear((6, 7), "float32", num_input_axes=2).apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x))
    assert_allclose(got, np.einsum("bshk,hkgd->bsgd", x, kernel), rtol=1e-4, atol=1e-5)


def test_rotate_by_hand():
    """Fails if pairs are neighbours, or the rotation runs backwards: a quarter turn for (1, 3), none for (2, 4)."""
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    got = rope.rotate(x, jnp.array([[2]]), jnp.array([math.pi / 4, 0.0]), scale=1.5)
    assert_allclose(got.ravel(), [-4.5, 3.0, 1.5, 6.0], atol=1e-5)


def rotated(x, position):
    frequencies = jnp.asarray(rope.inverse_frequencies(6, 50.0, transformer.NO_SCALING))
    x = jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 6)
    return np.asarray(rope.rotate(x, jnp.array([[position]]), frequencies)).ravel()


def test_rotation_keeps_the_length_of_each_pair():
    """Fails if sine and cosine come from different angles."""
    x = np.array([1.0, -2.0, 3.0, 0.5, 4.0, -1.5])
    got = rotated(x, 7)
    assert np.abs(got - x).max() > 0.5
    assert_allclose(np.hypot(got[:3], got[3:]), np.hypot(x[:3], x[3:]), rtol=1e-5)


def test_rotated_products_depend_on_the_distance_only():
    """Fails if the sign of one sine flips: the map is then no rotation."""
    query, key = np.array([1.0, -2.0, 3.0, 0.5, 4.0, -1.5]), np.array([0.3, 2.0, -1.0, 1.0, 0.7, 2.5])
    near, far, other = (rotated(query, a) @ rotated(key, b) for a, b in [(7, 4), (23, 20), (7, 5)])
    assert_allclose(near, far, rtol=1e-4)
    assert abs(near - other) > 0.5


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling", "want"),
    [
        (4, 100.0, rope.RopeScaling(), [1.0, 0.1]),
        (4, 100.0, rope.RopeScaling("linear", 4.0), [0.25, 0.025]),
        # turns in 126 tokens: 20.05, 2.005, 0.2005; the second lies (2.005 - 1) / (5 - 1) = 0.2513 of the way up
        (
            6,
            1e3,
            rope.RopeScaling("llama3", 8.0, 126, low_frequency_factor=1.0, high_frequency_factor=5.0),
            [1.0, 0.2513 * 0.1 + 0.7487 * 0.1 / 8, 0.01 / 8],
        ),
        # 6283 tokens are 1000, 100, 10 and 1 turns: 200 turns lie between pairs 0 and 1, 1 turn at pair 3
        (
            8,
            1e4,
            rope.RopeScaling("yarn", 4.0, 6283, beta_fast=200.0, beta_slow=1.0),
            [1.0, 0.1 * 2 / 3 + 0.025 / 3, 0.01 / 3 + 0.0025 * 2 / 3, 0.001 / 4],
        ),
    ],
    ids=["none", "linear", "llama3", "yarn"],
)
def test_inverse_frequencies_by_hand(head_dim, theta, scaling, want):
    """Fails if a blend takes the wrong end, or a factor multiplies instead of dividing."""
    assert_allclose(rope.inverse_frequencies(head_dim, theta, scaling), want, rtol=1e-4)


def test_unknown_rope_kind_is_refused():
    """Fails if an unknown kind falls through to no scaling."""
    with pytest.raises(ValueError, match=r"rope_scaling\.kind: got 'ntk'"):
        rope.inverse_frequencies(4, 100.0, rope.RopeScaling("ntk"))


@pytest.mark.parametrize(
    ("scaling", "want"),
    [
        (rope.RopeScaling("yarn", 4.0), 1.1386294),
        (rope.RopeScaling("yarn", 4.0, attention_factor=1.3), 1.3),
        (rope.RopeScaling("yarn", 0.5), 1.0),
        (rope.RopeScaling("linear", 4.0), 1.0),
    ],
)
def test_attention_scale(scaling, want):
    """Fails if another kind than yarn scales, or an explicit attention_factor is ignored."""
    assert rope.attention_scale(scaling) == pytest.approx(want, rel=1e-6)


def attend_one(keys, *, softcap=0.0):
    """One query of 1, values 8, 4 and an invisible 100."""
    key = jnp.asarray([*keys, 9.0], jnp.float32).reshape(1, 1, 3, 1)
    positions = attention.Positions(jnp.array([[1]]), jnp.array([[0, 1, 0]]), jnp.array([[True, True, False]]))
    value = jnp.array([8.0, 4.0, 100.0]).reshape(1, 1, 1, 3)
    query = jnp.ones((1, 1, 1, 1))
    mixed = attention.attend(query, key, value, positions, local=None, window=0, softcap=softcap, mesh=None)
    return mixed.item()


def test_attend_by_hand():
    """Fails if scores are scaled once more, or a masked key is seen: weights 1/4 and 3/4."""
    assert attend_one([0.0, math.log(3)]) == pytest.approx(5.0, rel=1e-5)


def test_attention_softcap_by_hand():
    """Fails if the cap is not multiplied back: 2 * tanh(x / 2) = ln 3."""
    assert attend_one([0.0, 2 * math.atanh(math.log(3) / 2)], softcap=2.0) == pytest.approx(5.0, rel=1e-5)


def test_grouped_heads_equal_repeated_heads():
    """Fails if neighbouring query heads do not share a key head."""
    config, params = make()
    repeated = params
    for name in ("k", "v"):
        repeated = replaced(repeated, f"layers/attention/{name}/kernel", lambda x: jnp.repeat(x, 2, axis=2))
    full = dataclasses.replace(config, num_kv_heads=4)
    assert_allclose(run(full, repeated), run(config, params), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, GEMMA], ids=["plain", "gemma"])
def test_future_tokens_are_unseen(settings):
    """Fails if the mask lets a token see those after it."""
    config, params = make(**settings)
    before, after = run(config, params), run(config, params, with_token(4, 7))
    assert_allclose(after[0, :4], before[0, :4], atol=1e-5)
    assert np.abs(after[0, 4:] - before[0, 4:]).max(axis=1).min() > 1e-3


@pytest.mark.parametrize(("local", "seen_by"), [(True, [0, 1, 2]), (False, [0, 1, 2, 3, 4, 5, 6])])
def test_sliding_window_counts_the_token_itself(local, seen_by):
    """Fails if the window is one token longer or shorter, or binds global layers too: one layer, window 3."""
    config, params = make(num_layers=1, local_pattern=(local, not local), sliding_window=3)
    change = np.abs(run(config, params, with_token(0, 7)) - run(config, params))[0].max(axis=1)
    assert np.flatnonzero(change > 1e-4).tolist() == seen_by


def test_window_counts_real_tokens_only():
    """Fails if positions count the padding: with two pads inside, the last token's window starts at column 2."""
    config, params = make(num_layers=1, local_pattern=(True,), sliding_window=3)
    mask = np.array([[True, True, True, False, False, True, True], [True] * 7])
    change = [
        np.abs(run(config, params, with_token(c, 7), mask) - run(config, params, IDS, mask))[0, 6] for c in (1, 2)
    ]
    assert change[0].max() < 1e-5
    assert change[1].max() > 1e-4


def test_local_layers_rotate_by_their_own_theta_without_scaling():
    """Fails if local layers take the scaled frequencies, yarn's attention scale, or rope_theta."""
    scaling = rope.RopeScaling("yarn", 4.0, 16)
    local, params = make(local_pattern=(True,), sliding_window=99, rope_theta_local=20.0, rope_scaling=scaling)
    plain = dataclasses.replace(PLAIN, rope_theta=20.0)
    assert_allclose(run(local, params), run(plain, params), rtol=1e-4, atol=1e-5)


def test_rope_scaling_reaches_the_global_layers():
    """Fails if the scaling is not used: linear scaling by 2 is another model, by 1 the same one."""
    config, params = make()
    twice, once = (
        run(dataclasses.replace(config, rope_scaling=rope.RopeScaling("linear", factor)), params)
        for factor in (2.0, 1.0)
    )
    assert_allclose(once, run(config, params), rtol=1e-5, atol=1e-5)
    assert np.abs(twice - once).max() > 1e-2


def test_yarn_scales_queries_and_keys():
    """Fails if attention_factor reaches only one of them: 1.5 on both is 2.25 on the query kernel alone."""
    scaling = rope.RopeScaling("yarn", 1.0, 16, attention_factor=1.5)
    config, params = make(rope_scaling=scaling)
    wider = replaced(params, "layers/attention/q/kernel", lambda x: 2.25 * x)
    assert_allclose(run(config, params), run(PLAIN, wider), rtol=1e-4, atol=1e-4)


def test_query_scale_replaces_the_default():
    """Fails if query_scale is ignored or multiplies the default."""
    config, params = make(query_scale=0.9)
    wider = replaced(params, "layers/attention/q/kernel", lambda x: 0.9 * math.sqrt(8) * x)
    assert_allclose(run(config, params), run(PLAIN, wider), rtol=1e-4, atol=1e-4)


def test_qk_norm_forgets_the_size_of_queries_and_keys():
    """Fails if queries or keys go unnormed."""
    config, params = make(qk_norm=True)
    wider = params
    for name, factor in (("q", 3.0), ("k", 5.0)):
        wider = replaced(wider, f"layers/attention/{name}/kernel", lambda x, factor=factor: factor * x)
    assert_allclose(run(config, wider), run(config, params), rtol=1e-3, atol=1e-3)


def test_qkv_bias_is_added():
    """Fails if a bias is dropped: with no kernel, every value is its bias, whatever the tokens before."""
    config, params = make(qkv_bias=True, num_layers=1)
    constant = replaced(params, "layers/attention/v/kernel", jnp.zeros_like)
    assert_allclose(run(config, constant, with_token(0, 7))[0, 1:], run(config, constant)[0, 1:], atol=1e-5)
    unbiased = replaced(constant, "layers/attention/v/bias", jnp.zeros_like)
    assert np.abs(run(config, unbiased) - run(config, constant)).max() > 1e-2


def test_post_norms_scale_what_attention_and_mlp_add():
    """Fails if a post norm is left out: with their scales 0 the layers add nothing, and tokens see themselves only."""
    config, params = make(post_norms=True)
    for name in ("attention", "mlp"):
        params = replaced(params, f"layers/{name}_post_norm/scale", jnp.zeros_like)
    x = np.asarray(params["embed"]["embedding"])[IDS]
    normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(params["final_norm"]["scale"])
    assert_allclose(run(config, params), normed @ np.asarray(params["embed"]["embedding"]).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "want"),
    [("silu", 2 / (1 + math.exp(-2))), ("gelu", 1 + math.tanh(2 * 0.7978846 * (1 + 0.044715 * 4)))],
)
def test_mlp_by_hand(activation, want):
    """Fails if gate and up swap, or gelu is the exact one: gate 2, up 3, down 1."""
    config = dataclasses.replace(PLAIN, width=1, mlp_dim=1, activation=activation)
    kernels = {"gate": 2.0, "up": 3.0, "down": 1.0}
    params = {name: {"kernel": jnp.full((1, 1), value)} for name, value in kernels.items()}
    got = transformer.Mlp(config).apply({"params": params}, jnp.ones((1, 1, 1)))
    assert got.item() == pytest.approx(3 * want, rel=1e-6)


def test_embedding_scale_is_the_root_of_the_width():
    """Fails if scale_embedding is ignored or uses the width itself."""
    config, params = make(scale_embedding=True, tied_head=False)
    larger = replaced(params, "embed/embedding", lambda x: 4.0 * x)
    assert_allclose(run(config, params), run(dataclasses.replace(PLAIN, tied_head=False), larger), rtol=1e-4, atol=1e-5)


def test_tied_head_is_the_embedding():
    """Fails if the tied head reads other weights."""
    config, params = make()
    untied = {**params, "lm_head": {"kernel": params["embed"]["embedding"].T}}
    assert_allclose(
        run(config, params), run(dataclasses.replace(config, tied_head=False), untied), rtol=1e-4, atol=1e-5
    )


def test_final_softcap_bounds_the_logits():
    """Fails if the cap is not applied, or not multiplied back."""
    config, params = make(final_softcap=1.5)
    plain = run(PLAIN, params)
    assert np.abs(plain).max() > 1.5
    assert_allclose(run(config, params), 1.5 * np.tanh(plain / 1.5), rtol=1e-4, atol=1e-5)


def test_scalar_head_is_one_number_a_token():
    """Fails if the scalar head takes another layer's output: its kernel as column 4 of a language head agrees."""
    config, params = make(head="scalar")
    language = {name: leaf for name, leaf in params.items() if name != "score"}
    kernel = jnp.zeros((16, 11)).at[:, 4].set(params["score"]["kernel"][:, 0])
    logits = run(dataclasses.replace(PLAIN, tied_head=False), {**language, "lm_head": {"kernel": kernel}})
    outputs = run(config, params)
    assert outputs.shape == (2, 7)
    assert_allclose(outputs, logits[..., 4], rtol=1e-4, atol=1e-5)


def test_fresh_scalar_head_is_zero():
    """Fails if a reward model starts with a random head."""
    model = Transformer(dataclasses.replace(PLAIN, head="scalar"))
    score = jax.jit(lambda key: model.init(key, IDS, MASK)["params"]["score"]["kernel"])(jax.random.key(0))
    assert_allclose(score, np.zeros((16, 1)))


@pytest.mark.parametrize("count", [1, 3])
def test_num_outputs_keeps_the_last_tokens(count):
    """Fails if the first tokens are kept."""
    config, params = make(num_layers=1)
    assert_allclose(run(config, params, num_outputs=count), run(config, params)[:, -count:], rtol=1e-5, atol=1e-5)


def test_masked_tokens_are_unseen():
    """Fails if padding is a key."""
    config, params = make()
    other = np.where(MASK, IDS, 9)
    assert (other != IDS).sum() == 2
    assert_allclose(run(config, params, other)[MASK], run(config, params)[MASK], atol=1e-5)


def test_left_padding_moves_nothing():
    """Fails if padding is a key: a padded prompt gives what the prompt alone gives."""
    config, params = make(**GEMMA)
    alone = run(config, params, IDS[1:, 2:], MASK[1:, 2:])
    assert_allclose(run(config, params)[1:, 2:], alone, rtol=1e-4, atol=1e-5)


def test_every_layer_counts():
    """Fails if the scan uses one layer's weights for all."""
    config, params = make(num_layers=3)
    base = run(config, params)
    for layer in range(3):
        changed = replaced(params, "layers/mlp/down/kernel", lambda x, layer=layer: x.at[layer].multiply(1.5))
        assert np.abs(run(config, changed) - base).max() > 1e-3


def test_local_pattern_repeats_over_the_layers():
    """Fails if the pattern is cut off after its first round."""
    config = dataclasses.replace(PLAIN, num_layers=5, local_pattern=(True, True, False), sliding_window=2)
    assert config.is_local == (True, True, False, True, True)


@pytest.mark.parametrize("settings", [{}, {**GEMMA, "tied_head": False, "qkv_bias": True}], ids=["plain", "gemma"])
def test_bfloat16_activations_stay_near_float32(settings):
    """Fails if a dtype is promoted silently, or the logits are not returned in float32."""
    config, params = make(**settings)
    rough = run(dataclasses.replace(config, dtype="bfloat16"), params)
    exact = run(config, params)
    assert rough.dtype == np.float32
    assert 1e-5 < np.abs(rough - exact)[MASK].max() < 0.05 * np.abs(exact).max()


def test_norm_works_in_float32():
    """Fails if a bfloat16 input is squared and divided in bfloat16: more than the result is then rounded."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 64)), jnp.bfloat16)
    params = {"params": {"scale": jnp.linspace(0.5, 2.0, 64)}}
    rough, exact = RMSNorm(PLAIN).apply(params, x), RMSNorm(PLAIN).apply(params, x.astype(jnp.float32))
    assert rough.dtype == jnp.bfloat16
    assert (rough == exact.astype(jnp.bfloat16)).all()


def test_cache_takes_several_tokens_at_a_time():
    """Fails if new keys are written over old ones, or if a chunk's tokens see those after them."""
    config, params = make(**GEMMA)
    outputs, cache = [], init_cache(config, 2, 9)
    model = Transformer(config)
    forward = jax.jit(lambda ids, mask, cache: model.apply({"params": params}, ids, mask, cache))
    for start, end in ((0, 3), (3, 4), (4, 7)):
        chunk, cache = forward(IDS[:, start:end], MASK[:, start:end], cache)
        outputs.append(chunk)
    assert int(cache.length) == 7
    assert_allclose(np.concatenate(outputs, axis=1)[MASK], run(config, params)[MASK], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads: got 3, want a multiple of num_kv_heads 2"),
        ({"head_dim": 7}, "head_dim: got 7, want an even number"),
        ({"local_pattern": (False, True)}, "sliding_window: got 0 with local layers"),
        ({"activation": "relu"}, "activation: got 'relu', want one of silu, gelu"),
        ({"head": "vector"}, "head: got 'vector', want 'language' or 'scalar'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    """Fails if a check of the config is removed."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **settings)
