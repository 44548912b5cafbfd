"""Sampling against exact probabilities and against a plain forward pass."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from warp_jax import trees
from warp_jax.generation import drawing, sampling
from warp_jax.generation.drawing import SamplingConfig
from warp_jax.models import partitioning, rope
from warp_jax.models.transformer import Transformer, TransformerConfig, init_cache
from warp_jax.parallel import meshes
from warp_jax.tpu_fit import hlo
from warp_jax.training import scoring
from warp_jax.types import PromptBatch, Rollout

PLAIN = TransformerConfig(vocab_size=16, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
LOCAL = {"local_pattern": (True, False), "sliding_window": 3, "rope_theta_local": 20.0}
GEMMA2 = {"norm_offset": 1.0, "post_norms": True, "scale_embedding": True, "activation": "gelu", **LOCAL}
GEMMA2 |= {"attention_softcap": 3.0, "final_softcap": 2.0}
VARIANTS = {
    "llama": {"tied_head": False, "rope_scaling": rope.RopeScaling("llama3", 4.0, 16)},
    "qwen2": {"qkv_bias": True, "rope_scaling": rope.RopeScaling("yarn", 4.0, 16)},
    "qwen3": {"qk_norm": True},
    "mistral": {"tied_head": False, "local_pattern": (True,), "sliding_window": 3},
    "gemma2": GEMMA2,
    "gemma3": {**GEMMA2, "num_layers": 3, "qk_norm": True, "local_pattern": (True, True, False)},
}
PROMPTS = PromptBatch(
    np.array([[0, 0, 5, 1, 2], [3, 1, 4, 1, 5], [0, 9, 2, 6, 3], [0, 0, 0, 0, 7]] * 2, np.int32),
    np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]] * 2, bool),
    np.arange(8, dtype=np.int32),
)


def make(**settings):
    """apply_fn, make_cache and random weights of a small transformer."""
    config = dataclasses.replace(PLAIN, **settings)
    model = Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), PROMPTS.prompt_ids, PROMPTS.prompt_mask)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, jnp.float32), shapes)
    return (
        lambda params, *args, **kw: model.apply({"params": params}, *args, **kw),
        functools.partial(init_cache, config),
        params,
    )


def bigram_apply(table, token_ids, mask, cache, num_outputs=0):
    """A policy whose logits are the row of the last token: table [V, V]."""
    return table[token_ids[:, -num_outputs:]], cache


@functools.cache
def bigram_sampler(config):
    return jax.jit(functools.partial(sampling.sample, bigram_apply, lambda batch, capacity: (), config=config))


def sample_bigram(table, first_tokens, key, config):
    """Completions of one-token prompts."""
    ids = np.asarray(first_tokens, np.int32)[:, None]
    prompts = PromptBatch(ids, np.ones_like(ids, bool), np.arange(len(ids), dtype=np.int32))
    return bigram_sampler(config)(jnp.asarray(table, jnp.float32), prompts, key)


def truncated(logits, temperature, top_k, top_p):
    """Probabilities by walking down the sorted tokens, in float64."""
    probs = np.exp(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-probs)[: top_k or None]
    total, kept, mass = probs[order].sum(), np.zeros_like(probs), 0.0
    for token in order:
        if mass < top_p:
            kept[token] = probs[token]
        mass += probs[token] / total
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.6), (0.7, 3, 0.8)]
)
def test_frequencies_are_the_exact_probabilities(temperature, top_k, top_p):
    """Fails if temperature multiplies, top-k keeps one more, top-p drops the last token, or both steps use one key."""
    table = np.random.default_rng(3).normal(size=(4, 4))
    stop, start, count = 3, 1, 6000
    config = SamplingConfig(2, temperature, (stop,), pad_id=0, top_k=top_k, top_p=top_p)
    ids = np.asarray(sample_bigram(table, [start] * count, jax.random.key(0), config).completion_ids)
    rows = [truncated(row, temperature, top_k, top_p) for row in table]
    want = {(a, b): rows[start][a] * rows[a][b] for a, b in itertools.product(range(3), range(4))}
    want[stop, 0] = rows[start][stop]
    got = {pair: int((ids == pair).all(axis=1).sum()) for pair in want}
    assert sum(got.values()) == count
    assert all(got[pair] == 0 for pair in want if want[pair] == 0)
    likely = [pair for pair in want if want[pair] * count >= 5]
    rest = count - sum(got[pair] for pair in likely)
    observed, expected = [got[pair] for pair in likely], [want[pair] * count for pair in likely]
    if count - sum(expected) > 1e-6:
        observed, expected = [*observed, rest], [*expected, count - sum(expected)]
    assert len(likely) >= 3
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 0.01
    first = [int((ids[:, 0] == token).sum()) for token in range(4) if rows[start][token] > 0]
    assert stats.chisquare(first, [p * count for p in rows[start] if p > 0]).pvalue > 0.01


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
        ({"top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"top_k": 9}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.45}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.6, "temperature": 0.5}, [0, 1, 0, 0]),  # 0.25 / 0.365 is enough
        ({"top_p": 0.82}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ({"top_p": 0.82, "top_k": 3}, [0, 0.625, 0, 0.375]),  # 0.8 / 0.95 is enough
    ],
)
def test_sampled_distribution_by_hand(settings, want):
    """Fails if top-p comes before temperature or top-k, or if the kept tokens are not renormalised."""
    config = SamplingConfig(**{"max_new_tokens": 1, "temperature": 1.0, "stop_ids": (), "pad_id": 0, **settings})
    logits = jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]])) + 2.0
    assert_allclose(jax.nn.softmax(drawing.kept_logits(logits, config)), [want], rtol=1e-5)


@pytest.mark.parametrize("vocab", [7, 128, 1000])
def test_draws_of_large_vocabularies_have_the_exact_probabilities(vocab):
    """Fails if a block or a token in it is drawn with a wrong weight, one random number serves both, or the padding of
    the last block is drawn. Half of the tokens have no probability.
    """
    rng, count = np.random.default_rng(vocab), 20_000
    logits = np.where(rng.permutation(vocab) % 2, rng.normal(size=vocab) * 2 + 40, -np.inf).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64) - 40)
    probabilities /= probabilities.sum()
    uniforms = jax.random.uniform(jax.random.key(vocab), (count, 2))
    tokens, logps = jax.jit(drawing.draw)(jnp.tile(logits, (count, 1)), uniforms)
    assert tokens.dtype == jnp.int32
    assert_allclose(np.exp(logps), probabilities[np.asarray(tokens)], rtol=1e-5)
    counts = np.bincount(tokens, minlength=vocab)
    likely = probabilities * count >= 5
    observed, expected = np.append(counts[likely], counts[~likely].sum()), probabilities[likely] * count
    expected = np.append(expected, count - expected.sum())
    keep = expected > 1e-6
    assert observed[~keep].sum() == 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 0.01


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_tokens_that_exist(uniform):
    """Fails if rounding at the end of the sums draws a token without probability."""
    logits = jnp.full((3, 500), -jnp.inf).at[[0, 1, 2], [3, 250, 499]].set(jnp.array([-900.0, 0.0, 5e4]))
    logits = logits.at[:, 5].set(logits.max(axis=1))
    tokens, logps = drawing.draw(logits, jnp.full((3, 2), uniform))
    assert_array_equal(tokens, [3, 5, 5] if uniform == 0 else [5, 250, 499])
    assert_allclose(logps, [np.log(0.5)] * 3, rtol=1e-5)
    assert np.isnan(drawing.draw(logits.at[1, 7].set(jnp.nan), jnp.zeros((3, 2)))[1][1])


def test_rounded_sums_draw_no_token_without_probability():
    """Fails if a cumulative sum that rounding lifts at a weight of 0 is taken for that weight."""
    rng = np.random.default_rng(0)
    weights = (rng.random((50, 2001)) * (rng.random((50, 2001)) > 0.5)).astype(np.float32)
    sums = np.asarray(jax.jit(functools.partial(jnp.cumsum, axis=1))(weights))
    rows, columns = np.nonzero((weights[:, 1:] == 0) & (np.diff(sums, axis=1) > 0))
    assert len(rows) > 100
    drawn = jax.jit(drawing._invert)(weights[rows], sums[rows, columns] / sums[rows].max(axis=1))
    assert (weights[rows, drawn] > 0).all()
    weights = rng.random((2000, 2001), np.float32)
    weights[:, 0] = 0  # what argmax returns if the last sum is below the share of another sum of these weights
    assert drawing._invert(weights, jnp.full(2000, 1 - 2**-24)).min() > 0


def test_no_random_number_draws_the_first_token_whatever_its_probability(monkeypatch):
    """Fails if a random number can be 0, which is smaller than any probability, or 1."""
    keys = jax.random.split(jax.random.key(0), 3)
    for low, token in ((0.0, 1), (1 - 2**-23, 999)):
        monkeypatch.setattr(jax.random, "uniform", lambda key, shape, low=low: jnp.full(shape, low, jnp.float32))
        logits = jnp.zeros((3, 1000)).at[:, 0].set(-60.0).at[:, 999].set(3.0)
        tokens, logps = drawing.draw(logits, drawing.uniforms(keys, jnp.arange(3)))
        assert tokens.tolist() == [token] * 3
        assert float(logps.min()) > -10


@pytest.mark.parametrize("vocab", [49152, 256128])  # SmolLM2, Gemma 2
def test_drawing_moves_one_block_of_the_vocabulary_between_chips(vocab):
    """Fails if blocks do not lie on one chip each: all logits of a row would be gathered for each token."""
    mesh = meshes.make_mesh((2, 1, 4))
    logits, uniforms = (
        jax.ShapeDtypeStruct((16, size), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", axis)))
        for size, axis in ((vocab, "tensor"), (2, None))
    )
    traffic = hlo.collectives(jax.jit(drawing.draw).lower(logits, uniforms).compile().as_text()).once
    block = vocab // drawing.BLOCKS
    assert 0 < sum(kind.bytes for kind in traffic.values()) < 8 * 4 * 2 * (block + drawing.BLOCKS)  # 8 rows a chip


@pytest.mark.parametrize("variant", ["qwen3", "gemma2"])
def test_samples_of_one_prompt_share_its_prefill(variant):
    """Fails if a sample continues another prompt, samples are not neighbours or equal, or each is processed anew."""
    apply_fn, make_cache, params = make(**VARIANTS[variant])
    rows = []

    def counted_apply(params, token_ids, *args, **kw):
        rows.append(token_ids.shape)
        return apply_fn(params, token_ids, *args, **kw)

    prompts, config = PromptBatch(*(x[:4] for x in PROMPTS)), SamplingConfig(6, 0.7, (4,), 0)
    run = functools.partial(sampling.sample, counted_apply, make_cache, params, config=config)
    together = run(prompts, jax.random.key(3), copies=3)
    assert rows == [(4, 5), (12, 1)]
    repeated = PromptBatch(*(np.repeat(x, 3, axis=0) for x in prompts))
    alone = run(repeated, jax.random.key(3))
    assert len(np.unique(np.asarray(together.completion_ids), axis=0)) > 6
    for name in ("prompt_ids", "prompt_mask", "example_ids", "completion_ids", "completion_mask"):
        assert_array_equal(getattr(together, name), getattr(alone, name))
    assert_allclose(together.per_token_logps, alone.per_token_logps, atol=1e-5)


def test_per_token_logps_by_hand():
    """Fails if scores are off by one position, ignore the temperature, or count the masked token: squares over 0.38."""
    table = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.5, 0.2, 0.3], [0.3, 0.5, 0.2]]))
    ids, mask = jnp.array([[1, 0], [2, 0]]), jnp.array([[True, True], [True, False]])
    rollout = Rollout(jnp.array([[0], [1]]), jnp.ones((2, 1), bool), jnp.arange(2), ids, mask, jnp.zeros((2, 2)))
    got = scoring.per_token_logps(bigram_apply, table, rollout, 0.5)
    assert_allclose(got, [[np.log(0.09 / 0.38), np.log(0.25 / 0.38)], [np.log(0.09 / 0.38), 0.0]], rtol=1e-5)


def test_sampled_logps_are_those_of_a_plain_forward_pass():
    """Fails if a cached key is misplaced, a position is off by one, or the temperature is left out of one side."""
    apply_fn, make_cache, params = make(**VARIANTS["gemma3"])
    config = SamplingConfig(6, 0.7, (4, 9), pad_id=0)

    @jax.jit
    def both(params, key):
        rollout = sampling.sample(apply_fn, make_cache, params, PROMPTS, key, config=config)
        return rollout, scoring.per_token_logps(apply_fn, params, rollout, 0.7)

    rollout, plain = both(params, jax.random.key(1))
    lengths = rollout.completion_mask.sum(axis=1)
    assert lengths.min() < 5 < lengths.max()
    assert_allclose(rollout.per_token_logps, plain, atol=1e-5)
    assert float(jnp.std(plain[rollout.completion_mask])) > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_gives_the_logits_without(variant):
    """Fails if the window or the rotation differs between the two, or a layer reads another layer's cache."""
    apply_fn, make_cache, params = make(**VARIANTS[variant])
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 16, (8, 6)), jnp.int32)

    @jax.jit
    def both(params):
        first, cache = apply_fn(params, PROMPTS.prompt_ids, PROMPTS.prompt_mask, make_cache(8, 12))

        def decode(cache, token):
            logits, cache = apply_fn(params, token[:, None], jnp.ones((8, 1), bool), cache)
            return cache, logits[:, 0]

        _, rest = jax.lax.scan(decode, cache, ids.T)
        mask = jnp.concatenate([PROMPTS.prompt_mask, jnp.ones((8, 6), bool)], axis=1)
        whole, _ = apply_fn(params, jnp.concatenate([PROMPTS.prompt_ids, ids], axis=1), mask)
        return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1), whole, mask

    cached, whole, mask = (np.asarray(x) for x in both(params))
    assert_allclose(cached[mask], whole[mask], rtol=1e-5, atol=2e-5)


def test_left_padding_changes_nothing():
    """Fails if padding is attended to or counted as a position: the same prompts with 0 and with 3 pads."""
    apply_fn, make_cache, params = make(**VARIANTS["mistral"])
    ids = np.random.default_rng(2).integers(0, 16, (8, 4)).astype(np.int32)
    short = PromptBatch(ids, np.ones_like(ids, bool), PROMPTS.example_ids)
    padded = PromptBatch(
        np.pad(ids, ((0, 0), (3, 0)), constant_values=11),
        np.pad(short.prompt_mask, ((0, 0), (3, 0))),
        PROMPTS.example_ids,
    )
    run = jax.jit(functools.partial(sampling.sample, apply_fn, make_cache, config=SamplingConfig(6, 0.7, (4,), 0)))
    alone, beside = (run(params, prompts, jax.random.key(3)) for prompts in (short, padded))
    assert len(np.unique(alone.completion_ids)) > 4
    assert_array_equal(beside.completion_ids, alone.completion_ids)
    assert_array_equal(beside.completion_mask, alone.completion_mask)
    assert_allclose(beside.per_token_logps, alone.per_token_logps, atol=1e-5)


def test_nothing_follows_a_stop_token():
    """Fails if the stop token is masked, a second stop id is ignored, or a stopped row continues."""
    table = np.random.default_rng(0).normal(size=(8, 8)) * 0.5
    table[:, 7] = -1e9  # so that the pad token is never sampled
    rollout = sample_bigram(table, [1, 3] * 20, jax.random.key(0), SamplingConfig(6, 1.0, (2, 5), pad_id=7))
    ids, mask, logps = np.asarray(rollout.completion_ids), np.asarray(rollout.completion_mask), rollout.per_token_logps
    stops = [next((t for t in range(6) if row[t] in (2, 5)), 5) for row in ids]
    assert {2, 5} <= set(ids[np.arange(40), stops])
    assert min(stops) == 0
    assert any(not {2, 5} & set(row) for row in ids)
    assert_array_equal(mask, np.arange(6) <= np.array(stops)[:, None])
    assert (ids[~mask] == 7).all()
    assert (ids[mask] != 7).all()
    assert_array_equal(np.asarray(logps)[~mask], 0.0)
    assert (np.asarray(logps)[mask] < 0).all()


def test_no_stop_ids_fills_every_row():
    """Fails if a token ends a completion although stop_ids is empty."""
    rollout = sample_bigram(np.zeros((3, 3)), [0, 1], jax.random.key(0), SamplingConfig(5, 1.0, (), pad_id=0))
    assert rollout.completion_mask.all()
    assert rollout.completion_mask.shape == (2, 5)


@pytest.mark.parametrize(("starts", "passes"), [([3, 3], 1), ([2, 3], 2), ([0, 3], 4)])
def test_sampling_ends_when_all_rows_have_stopped(starts, passes):
    """Fails if the loop always runs max_new_tokens times, or ends with the first row: token n is followed by n + 1."""
    table, calls = jnp.asarray(np.eye(5, k=1) * 1e4, jnp.float32), []

    def counted_apply(table, token_ids, mask, cache, num_outputs):
        jax.debug.callback(lambda: calls.append(1))
        return bigram_apply(table, token_ids, mask, cache, num_outputs)

    ids = np.array(starts, np.int32)[:, None]
    prompts = PromptBatch(ids, np.ones_like(ids, bool), np.arange(2))
    config = SamplingConfig(9, 1.0, (4,), pad_id=0)
    rollout = sampling.sample(
        counted_apply, lambda batch, capacity: (), table, prompts, jax.random.key(0), config=config
    )
    jax.block_until_ready(rollout)
    jax.effects_barrier()
    assert len(calls) == passes
    assert_array_equal(rollout.completion_mask.sum(axis=1), [passes, 1])


def test_keys_decide():
    """Fails if the key is ignored: the same key repeats, another differs."""
    config = SamplingConfig(6, 1.0, (), pad_id=0)
    draws = [sample_bigram(np.zeros((5, 5)), range(5), jax.random.key(k), config).completion_ids for k in (0, 0, 1)]
    assert_array_equal(draws[0], draws[1])
    assert (np.asarray(draws[0]) != np.asarray(draws[2])).mean() > 0.5


@functools.cache
def on_one_device():
    apply_fn, make_cache, params = make(**VARIANTS["qwen2"])
    run = functools.partial(sampling.sample, apply_fn, make_cache, config=SamplingConfig(6, 0.7, (4,), pad_id=0))
    return run, params, jax.jit(run)(params, PROMPTS, jax.random.key(5))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_eight_devices_sample_what_one_does(sizes):
    """Fails if noise is drawn per device, or if a row's cache is read by another row."""
    run, params, want = on_one_device()
    mesh = meshes.make_mesh(sizes)
    placed = jax.device_put(params, partitioning.param_shardings(mesh, params))
    got = jax.jit(run, out_shardings=meshes.batch_sharding(mesh))(
        placed, meshes.put_batch(mesh, PROMPTS), jax.random.key(5)
    )
    assert len(got.completion_ids.sharding.device_set) == 8
    assert_array_equal(got.completion_ids, want.completion_ids)
    assert_array_equal(got.completion_mask, want.completion_mask)
    assert_allclose(got.per_token_logps, want.per_token_logps, atol=1e-5)


def test_the_copy_for_generation_keeps_norms_in_float32():
    """Fails when the scales of norms, which compute in float32, are rounded: samples would be of another model."""
    apply_fn, make_cache, params = make(dtype="bfloat16", qk_norm=True)
    config = SamplingConfig(2, 1.0, (0,), 0)
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    names = {"apply_fn": apply_fn, "make_cache": make_cache, "dtype": "bfloat16", "config": config}
    copy = sampling.make_sampler(mesh, params, **names).lay_out(params)
    dtypes = {trees.path_name(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(copy)}
    assert {name.endswith("scale") for name in dtypes} == {True, False}
    assert all(dtype == ("float32" if name.endswith("scale") else "bfloat16") for name, dtype in dtypes.items())
