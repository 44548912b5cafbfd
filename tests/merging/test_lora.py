"""Merging LoRA adapters, against the PEFT library's own merge into full weights."""

import json
import tracemalloc

import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from warp_jax.merging.chunking import chunk_room, open_inputs
from warp_jax.merging.on_disk import Settings, merge_folders
from warp_jax.storage.lora_folder import LoraFolder
from warp_jax.storage.weight_files import open_weights

pytestmark = pytest.mark.filterwarnings(  # of PEFT
    "ignore::FutureWarning", "ignore:Setting `save_embedding_layers`", "ignore:The following alpha_pattern keys"
)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
OTHER_OPTIONS = ("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens")
OTHER_OPTIONS += ("lora_bias", "velora_config", "monteclora_config", "kasa_config", "arrow_config", "megatron_config")
PLAIN = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS = {
    "plain": {**PLAIN, "r": 4, "lora_alpha": 6},
    "rslora": {**PLAIN, "r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        **PLAIN,
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {
            "proj": 99,
            "self_attn.q": 77,
            "layers.1.*v_proj": 3,
            "v_proj": 5,
        },  # the first two match none
    },
    "whole": {"target_modules": ["embed_tokens", "up_proj"], "r": 4, "lora_alpha": 7, "modules_to_save": ["lm_head"]},
}


def _base_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


def _adapter(path, seed, base=None, **options):
    """Save a random adapter in `path`; return the full weights that PEFT makes of it, in float64."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base or _base_model(), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(path)
    merged = model.double().merge_and_unload()
    return {name: value.numpy().astype(np.float64) for name, value in merged.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of the base model, float32."""
    path = tmp_path_factory.mktemp("base")
    _base_model().save_pretrained(path)
    return path


def _save_full(path, weights):
    path.mkdir()
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in weights.items()}, path / "model.safetensors"
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_reads_as_the_full_weights(base, tmp_path, kind):
    """Mutation: alpha / rank for rsLoRA; patterns ignored, matched in part, or the last one wins; embeddings not
    transposed; saved modules left out."""
    want = _adapter(tmp_path / "adapter", 1, **ADAPTERS[kind])
    folder = LoraFolder(tmp_path / "adapter", open_weights(base))
    changed = 0
    before = safetensors.numpy.load_file(base / "model.safetensors")
    for name, tensor in folder.tensors.items():
        got = folder.view(name, 0, tensor.size)
        np.testing.assert_allclose(got, want[name].reshape(-1), rtol=1e-12, atol=1e-15, err_msg=name)
        pieces = [folder.view(name, start, min(start + 37, tensor.size)) for start in range(0, tensor.size, 37)]
        np.testing.assert_allclose(np.concatenate(pieces), got, rtol=1e-14, err_msg="a product of other sizes")
        changed += not np.array_equal(got, before[name].reshape(-1))
    assert changed == {"plain": 6, "rslora": 6, "patterns": 6, "whole": 4}[kind]


def test_layers_that_store_their_weight_transposed(tmp_path):
    """Mutation: fan_in_fan_out is ignored, also where the weight is square and B A fits both ways."""
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 8, "vocab_size": 20}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "r": 2, "lora_alpha": 3}
    want = _adapter(tmp_path / "adapter", 1, model, **options)
    folder = LoraFolder(tmp_path / "adapter", open_weights(tmp_path / "base"))
    before = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"):
        got = folder.view(name, 0, want[name].size).reshape(want[name].shape)
        np.testing.assert_allclose(got, want[name], rtol=1e-12, atol=1e-15)
        assert not np.array_equal(got, before[name])


def test_an_embedding_of_a_reward_model_in_float64(tmp_path):
    """Mutation: the embedding of a model with a score is taken for its head; a base model in float64 is rounded."""
    rng = np.random.default_rng(0)
    embedding, a, b = (rng.normal(size=shape) for shape in ((5, 3), (2, 5), (3, 2)))
    _save_full(tmp_path / "base", {"model.embed_tokens.weight": embedding, "score.weight": np.ones((1, 3))})
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.model.embed_tokens.lora_embedding_{x}": value for x, value in (("A", a), ("B", b))}
    safetensors.numpy.save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 3}')
    got = LoraFolder(tmp_path / "adapter", open_weights(tmp_path / "base")).view("model.embed_tokens.weight", 0, 15)
    np.testing.assert_allclose(got, (embedding + 3 / 2 * (b @ a).T).reshape(-1), rtol=1e-14)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_whole_model_beside_an_adapter_is_refused(base, tmp_path, name):
    """Mutation: the adapter is merged in silence if the model beside it is in several files."""
    _adapter(tmp_path / "adapter", 1, **ADAPTERS["plain"])
    (tmp_path / "adapter" / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds a whole model \({name}\) and a LoRA adapter"):
        open_inputs(base, [tmp_path / "adapter"], None)


@pytest.mark.parametrize(("dtype", "rounding"), [("float64", 1e-12), ("bfloat16", 2**-8), (None, 2**-23)])
def test_merging_adapters_is_merging_their_full_weights(base, tmp_path, dtype, rounding):
    """Mutation: the change rounded to the base model's dtype before the merge; the result in the dtype of the sum."""
    for number, kind in enumerate(("plain", "rslora", "patterns")):
        full = _adapter(tmp_path / f"adapter_{number}", number + 1, **ADAPTERS[kind])
        _save_full(tmp_path / f"full_{number}", full)
    results = []
    for kind in ("adapter", "full"):
        policies = [tmp_path / f"{kind}_{number}" for number in range(3)]
        settings = Settings(etas=(0.3,), dtype=dtype or ("float32" if kind == "full" else None))
        report = merge_folders(base, policies, tmp_path / f"out_{kind}", settings)
        results.append(safetensors.torch.load_file(tmp_path / f"out_{kind}" / "eta_0.3" / "model.safetensors"))
        assert len(report["xxh3_128"]) == {"adapter": 1 + 2 * 3, "full": 1 + 3}[kind]
    start = safetensors.torch.load_file(base / "model.safetensors")
    for name, got in results[0].items():
        assert str(got.dtype) == f"torch.{dtype or 'float32'}"
        np.testing.assert_allclose(got.double(), results[1][name].double(), rtol=2 * rounding, atol=1e-12, err_msg=name)
    changed = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(results[0][changed].float(), start[changed])


def test_a_saved_embedding_takes_the_place_of_the_old_one(base, tmp_path):
    """Mutation: the weight that PEFT saves below the factors of an embedding is left out, or the factors are."""
    want = _adapter(tmp_path / "adapter", 1, **ADAPTERS["whole"])["model.embed_tokens.weight"]
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += np.float32(0.25)
    safetensors.numpy.save_file(tensors, path)
    got = LoraFolder(tmp_path / "adapter", open_weights(base)).view("model.embed_tokens.weight", 0, want.size)
    np.testing.assert_allclose(got, want.reshape(-1) + 0.25, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stored_head", [False, True])
@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {**PLAIN, "modules_to_save": ["embed_tokens"]}]
)
@pytest.mark.filterwarnings(
    "ignore:Model with `tie_word_embeddings=True`", "ignore:Model has `tie_word_embeddings=True`"
)
def test_a_changed_embedding_that_is_also_the_head_is_refused(tmp_path, options, stored_head):
    """Mutation: the head of a tied model changes too, though the adapter was trained with the old one; a model that
    stores its tied head counts as untied.
    """
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    if stored_head:
        weights = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        safetensors.numpy.save_file(weights, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"adapter: changes 'model.embed_tokens.weight', but embedding and head of"):
        LoraFolder(tmp_path / "adapter", open_weights(tmp_path / "base"))


def test_an_adapter_counts_in_the_limit_of_memory(base, tmp_path):
    """Mutation: a view of an adapter is taken for four bytes per element, though it holds three float64 arrays."""
    _adapter(tmp_path / "adapter", 1, **ADAPTERS["plain"])
    inputs = open_inputs(base, [tmp_path / "adapter"], None)
    assert chunk_room(inputs, memory_gb=1e-3, workers=1) == 1e6 // (4 + 4 + 3 * 8)


@pytest.mark.parametrize("kind", ["lora", "lora_embedding"])
def test_a_view_widens_only_the_rows_that_it_reads(tmp_path, kind):
    """Mutation: the whole of a large factor becomes float64 for each chunk."""
    large, small = np.ones((9_999, 4), np.float32), np.full((4, 3), 2, np.float32)
    a, b = (small, large) if kind == "lora" else (large.T, small.T)
    _save_full(tmp_path / "base", {"x.weight": np.zeros((9_999, 3), np.float32)})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 4}')
    factors = {f"base_model.model.x.{kind}_A": np.ascontiguousarray(a), f"base_model.model.x.{kind}_B": b.copy()}
    safetensors.numpy.save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    folder = LoraFolder(tmp_path / "adapter", open_weights(tmp_path / "base"))
    tracemalloc.start()
    try:
        got = folder.view("x.weight", 4, 11)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert got.tolist() == [8.0] * 7
    assert peak < large.nbytes / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is set, and is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', want 'LORA'"),
        *(({"init_lora_weights": x}, "also changes the base") for x in ("pissa_niter_4", "olora", "loftq", "corda")),
        ({"use_newer_lora": True}, "use_newer_lora is set"),
        *(({name: [1]}, f"{name} is set") for name in OTHER_OPTIONS),
        ({"lora_alpha": None}, "lora_alpha or alpha_pattern is None"),
        ({"alpha_pattern": {"(": 3}}, r"adapter_config.json: alpha_pattern: got '\(', want a regular expression"),
        ({"alpha_pattern": {"a(?i)": 3}}, r"alpha_pattern: got 'a\(\?i\)', want a regular expression"),
        ({"alpha_pattern": [3]}, r"adapter_config.json: alpha_pattern is \[3\], want a number for each pattern"),
        ({"alpha_pattern": {"q_proj": "3"}}, "lora_alpha or alpha_pattern is '3' for .*q_proj, want a number"),
    ],
)
def test_other_adapters_are_refused_by_name(base, tmp_path, changes, message):
    """Mutation: an option that changes what the factors mean is ignored."""
    _adapter(tmp_path / "adapter", 1, **ADAPTERS["plain"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        LoraFolder(tmp_path / "adapter", open_weights(base))


SAVED = "base_model.model.lm_head.weight"


def _rename(old, new):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename("down_proj", "other"), "which is missing in"),
        (_rename("base_model.model.", ""), "want floats named base_model.model"),
        (_rename("lora_A", "lora_C"), "neither a LoRA factor nor a weight"),
        (lambda tensors: {n: x for n, x in tensors.items() if "1.mlp.down_proj.lora_B" not in n}, "has no lora_B"),
        (lambda tensors: {n: x for n, x in tensors.items() if "1.mlp.down_proj.lora_A" not in n}, "has no lora_A"),
        (lambda tensors: {n: x[:, :-1].copy() for n, x in tensors.items()}, "do not fit"),
        (lambda tensors: {n: x.astype(np.int32) for n, x in tensors.items()}, "want floats named"),
        (lambda tensors: {**tensors, SAVED: np.ones((2, 3), np.float32)}, "neither a LoRA factor nor a weight"),
    ],
)
def test_factors_that_do_not_fit_are_refused(base, tmp_path, change, message):
    """Mutation: a factor without a place or its partner is left out in silence; a whole tensor may have any shape."""
    _adapter(tmp_path / "adapter", 1, **ADAPTERS["plain"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)
    with pytest.raises(ValueError, match=message):
        LoraFolder(tmp_path / "adapter", open_weights(base))
