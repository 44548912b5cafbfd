"""Hugging Face checkpoints in and out, against transformers itself on small random models of every family."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import ALL, FAMILIES, IDS, LENGTH, MASK, REWARD_MODELS
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import load_file, save_file

from warp_jax.generation import sampling
from warp_jax.models import partitioning
from warp_jax.models.transformer import Transformer, TransformerConfig, init_cache
from warp_jax.parallel import meshes
from warp_jax.pretrained import hf_weights
from warp_jax.pretrained.hf_config import read_config
from warp_jax.rewards import reward_functions
from warp_jax.types import PromptBatch

NUM_TOKENS = 64
TOLERANCE = 1e-4  # of the largest logit
FEW = ("gemma3_linear", "llama2", "qwen2_tied")


class Case(NamedTuple):
    folder: Path
    config: TransformerConfig
    params: Any


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The checkpoint of a family, read once."""

    @functools.cache
    def make(name):
        folder = hf_models.make_folder(name, tmp_path_factory.mktemp(name))
        config = read_config(folder)
        return Case(folder, config, load(folder, config))

    return make


@functools.cache
def shapes_of(config):
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), IDS, MASK)["params"]


def like(config, sizes):
    """Shapes and shardings of the parameters on a mesh of the first devices."""
    mesh = meshes.make_mesh(sizes, jax.devices()[: int(np.prod(sizes))])
    shapes = shapes_of(config)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        partitioning.param_shardings(mesh, shapes),
    )


def load(folder, config, sizes=(1, 1, 1)):
    return hf_weights.load_params(folder, config, like(config, sizes))


@functools.cache
def forward(config):
    return jax.jit(lambda params, ids, mask: Transformer(config).apply({"params": params}, ids, mask)[0])


def run(config, params, ids=IDS, mask=MASK):
    """Outputs of one forward pass, as numpy."""
    return np.asarray(forward(config)(params, jnp.asarray(ids), jnp.asarray(mask)))


def assert_close(got, want, mask=MASK):
    """Equal at real tokens, up to TOLERANCE times the largest output."""
    assert_allclose(got[mask], want[mask], rtol=0, atol=TOLERANCE * np.abs(want[mask]).max())


def assert_trees_equal(got, want):
    jax.tree.map(assert_array_equal, got, want)


def tensors(folder):
    """Every tensor of a folder as (dtype, shape, bytes), by the name that a text-only model gives it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if "vision_tower" not in name and "multi_modal_projector" not in name:
                raw = tensor.contiguous().view(dtype=hf_models.torch.uint8).numpy().tobytes()
                found[name.replace("language_model.", "")] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(case, name):
    """Fails if a norm, bias, scale, cap, window, activation, rotary setting or transpose of any family is wrong."""
    _, config, params = case(name)
    assert_close(run(config, params), hf_models.outputs(hf_models.make_model(name)))


@functools.cache
def greedy(name):
    """transformers' greedy completions of IDS, and its logits of each whole sequence."""
    model = hf_models.make_model(name)
    tokens = hf_models.generate(model, NUM_TOKENS)
    ids, mask = np.concatenate([IDS, tokens], axis=1), np.concatenate([MASK, np.ones_like(tokens, bool)], axis=1)
    return tokens, mask, hf_models.outputs(model, ids, mask)


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_greedy_decoding_equals_transformers(case, name):
    """Fails if the cache forgets a key, its position or its validity, or a window slides by one: 64 greedy tokens
    after left padding, one at a time, and the logits of every step, against a forward pass without a cache too.
    """
    _, config, params = case(name)
    model, want, mask, logits = Transformer(config), *greedy(name)

    @jax.jit
    def decode(params, prompt_ids, mask):
        def step(carry, column):
            cache, guess = carry
            token = jnp.where(column < LENGTH, prompt_ids[:, jnp.minimum(column, LENGTH - 1)], guess)
            logits, cache = model.apply({"params": params}, token[:, None], mask[:, column][:, None], cache)
            return (cache, logits[:, 0].argmax(axis=-1).astype(jnp.int32)), (token, logits[:, 0])

        start = init_cache(config, len(IDS), mask.shape[1]), jnp.zeros(len(IDS), jnp.int32)
        return jax.lax.scan(step, start, jnp.arange(mask.shape[1]))[1]

    tokens, got = (np.moveaxis(np.asarray(x), 0, 1) for x in decode(params, jnp.asarray(IDS), jnp.asarray(mask)))
    assert_array_equal(tokens[:, LENGTH:], want)
    assert_close(got, logits, mask)
    assert_close(got[:, :LENGTH], run(config, params))


@pytest.mark.parametrize("name", ["gemma3_linear", "qwen2_sliding"])
def test_sample_completes_like_transformers(case, name):
    """Fails if the prefill of several tokens and the steps after it disagree: `sampling.sample` with top_k = 1."""
    _, config, params = case(name)
    settings = sampling.SamplingConfig(NUM_TOKENS, temperature=1.0, stop_ids=(), pad_id=0, top_k=1)

    def apply(params, *args, **kwargs):
        return Transformer(config).apply({"params": params}, *args, **kwargs)

    make_cache = functools.partial(init_cache, config)
    prompts = PromptBatch(jnp.asarray(IDS), jnp.asarray(MASK), jnp.arange(3))
    sample = jax.jit(functools.partial(sampling.sample, apply, make_cache, config=settings))
    assert_array_equal(sample(params, prompts, jax.random.key(0)).completion_ids, greedy(name)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_well_decided(name):
    """Fails if a seed in hf_models no longer decides every greedy token by ten times the tolerance."""
    tokens, _, logits = greedy(name)
    logits = logits[:, LENGTH - 1 : -1]
    second, first = np.sort(logits, axis=-1)[..., -2:].transpose(2, 0, 1)
    assert (first - second).min() > 10 * TOLERANCE * np.abs(logits).max()
    assert min(len(set(row)) for row in tokens.tolist()) >= 8


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_scores_equal_those_of_transformers(case, name):
    """Fails if the score is read at another token than the last real one, with padding on both sides."""
    _, config, params = case(name)
    mask = MASK & (np.arange(LENGTH)[None] < np.array([LENGTH - 3, LENGTH, LENGTH - 1])[:, None])
    ids = np.where(mask, IDS, 0)

    def apply(params, ids, mask):
        return jnp.asarray(run(config, params, ids, mask)), None

    got = reward_functions.sequence_scores(apply, params, jnp.asarray(ids), jnp.asarray(mask))
    want = hf_models.outputs(hf_models.make_model(name), ids, mask)
    assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("name", ALL)
def test_eight_devices_equal_one(case, name):
    """Fails if a device reads another part of a tensor than its own, or a forward pass mixes up the shards."""
    folder, config, params = case(name)
    sharded = load(folder, config, ALL[name].mesh)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(sharded))
    assert not sharded["layers"]["attention"]["q"]["kernel"].sharding.is_fully_replicated
    assert_trees_equal(sharded, params)
    assert_close(run(config, sharded), run(config, params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_round_trip_keeps_every_byte(tmp_path, name, dtype):
    """Fails if a tensor is renamed, transposed, rounded or lost on the way in and out."""
    folder = hf_models.make_folder(name, tmp_path / "in", dtype=dtype)
    config = read_config(folder)
    hf_weights.export_params(load(folder, config), config, tmp_path / "out", dtype=dtype)
    got, want = tensors(tmp_path / "out"), tensors(folder)
    assert got.keys() == want.keys()
    assert [name for name in want if got[name] != want[name]] == []


@pytest.mark.parametrize("name", ALL)
def test_transformers_loads_an_export(case, tmp_path, name):
    """Fails if transformers misses a weight, finds one too many, or reads another setting from config.json."""
    _, config, params = case(name)
    hf_weights.export_params(params, config, tmp_path / "out", dtype="float32")
    assert read_config(tmp_path / "out") == config
    model, report = hf_models.load_model(tmp_path / "out")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.config.pad_token_id = 0
    want = hf_models.outputs(hf_models.make_model(name))
    assert_allclose(hf_models.outputs(model), want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (3.4e38, "bfloat16"), (np.nan, "float32")])
def test_export_refuses_weights_that_are_not_finite(case, tmp_path, value, dtype):
    """Mutation: infinite weights are written without a word, or only overflows are looked for."""
    _, config, params = case("llama2")
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[..., 1].set(value) if "final_norm" in str(path) else x, params
    )
    with pytest.raises(ValueError, match=rf"'model.norm.weight' holds NaN or Inf as {dtype}, want finite"):
        hf_weights.export_params(params, config, tmp_path / "out", dtype=dtype)


def test_export_keeps_the_given_config_and_sidecars(case, tmp_path):
    """Fails if config_json or a sidecar is dropped, or the config has another dtype than the weights."""
    folder, config, params = case("qwen2")
    (tmp_path / "tokenizer.json").write_text("{}")
    content = {**json.loads((folder / "config.json").read_text()), "eos_token_id": 17}
    sidecars = [tmp_path / "tokenizer.json"]
    hf_weights.export_params(params, config, tmp_path / "out", dtype="bfloat16", config_json=content, sidecars=sidecars)
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    assert got == {**content, "dtype": "bfloat16"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", FEW)
def test_shards_load_like_one_file(case, tmp_path, name):
    """Fails if a tensor is looked for in another shard than its own."""
    _, config, params = case(name)
    folder = hf_models.make_folder(name, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_trees_equal(load(folder, config), params)


@pytest.mark.parametrize("name", FEW)
def test_export_in_shards_loads_the_same(case, tmp_path, monkeypatch, name):
    """Fails if the index or the split of an export in several files is wrong: transformers reads it too."""
    _, config, params = case(name)
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 20_000)
    hf_weights.export_params(params, config, tmp_path / "out", dtype="float32")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_trees_equal(load(tmp_path / "out", config), params)
    assert not hf_models.load_model(tmp_path / "out")[1]["missing_keys"]


@pytest.mark.parametrize("name", FEW)
def test_groups_of_layers_hold_the_same_weights(case, tmp_path, name):
    """Fails if a stack that does not begin at layer 0 takes or gives another layer's weights."""
    folder, config, _ = case(name)
    grouped = dataclasses.replace(config, layer_groups=(1, config.num_layers - 1))
    params = load(folder, grouped)
    assert {"layers_from_0", "layers_from_1"} < params.keys()
    hf_weights.export_params(params, grouped, tmp_path / "out", dtype="float32")
    assert tensors(tmp_path / "out") == tensors(folder)


def rename(folder, out, change):
    """A copy of a folder whose weights are changed by a function of {name: tensor}."""
    out.mkdir()
    save_file(change(load_file(folder / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


def test_older_names_of_a_text_tower(case, tmp_path):
    """Fails if files with 'language_model.model.' before every name are not read as those with it inside."""
    folder, config, params = case("gemma3_multimodal")

    def older(weights):
        new = {name.replace("model.language_model.", "language_model.model."): x for name, x in weights.items()}
        assert "language_model.model.norm.weight" in new
        return {name.removeprefix("model.") if "vision" in name else name: x for name, x in new.items()}

    assert_trees_equal(load(rename(folder, tmp_path / "old", older), config), params)


def test_what_old_files_store_beside_the_weights(case, tmp_path):
    """Fails if inverse frequencies, which are computed from the config, are rejected as unexpected tensors."""
    folder, config, params = case("llama2")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": hf_models.torch.ones(4)}
    assert_trees_equal(load(rename(folder, tmp_path / "old", lambda weights: {**weights, **extra}), config), params)


def test_a_tied_head_stored_twice(case, tmp_path):
    """Fails if a copy of the embedding is refused, or a head that differs from it is dropped in silence."""
    folder, config, params = case("smollm2")

    def twice(weights, change=0.0):
        return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + change}

    assert_trees_equal(load(rename(folder, tmp_path / "same", twice), config), params)
    other = rename(folder, tmp_path / "other", functools.partial(twice, change=0.5))
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'lm_head\.weight' differs"):
        load(other, config)
