"""config.json against transformers: old and new forms, defaults, published files, and what is refused by name."""

import dataclasses
import functools
import json

import hf_models
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hf_models import ALL
from huggingface_hub.errors import StrictDataclassError

from warp_jax.models import presets, rope, transformer
from warp_jax.models.rope import RopeScaling
from warp_jax.pretrained import hf_config
from warp_jax.pretrained.hf_config import read_config


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The checkpoint of a family, made once."""
    return functools.cache(lambda name: hf_models.make_folder(name, tmp_path_factory.mktemp(name)))


def edited(folder, tmp_path, **changes):
    """A folder with the config.json of another one, changed."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return hf_models.edit_config(tmp_path, **changes)


def older_form(content):
    """config.json as transformers 4 wrote it: rope_theta and rope_scaling, a pattern instead of layer types."""
    content = dict(content)
    content["torch_dtype"] = content.pop("dtype", None)
    layers = content.pop("layer_types", None)
    parameters = content.pop("rope_parameters")
    full = dict(parameters.get("full_attention", parameters))
    content["rope_theta"] = full.pop("rope_theta")
    content["rope_scaling"] = None
    if full.pop("rope_type") != "default":
        kind = parameters.get("full_attention", parameters)["rope_type"]
        name = "rope_type" if kind == "llama3" or "full_attention" in parameters else "type"
        content["rope_scaling"] = {**full, name: kind}
    if "sliding_attention" in parameters:
        content["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        content["sliding_window_pattern"] = layers.index("full_attention") + 1
    return content


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"gemma3_multimodal"}))
def test_older_configs_say_the_same(folder_of, tmp_path, name):
    """Fails if a field of transformers 4's config.json is misread; transformers 5 reads it as its own."""
    folder = folder_of(name)
    content = older_form(json.loads((folder / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(content))
    both = [transformers.AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path, folder)]
    for key in ("layer_types", "sliding_window", "head_dim"):
        assert both[0].get(key) == both[1].get(key)
    assert {**both[1]["rope_parameters"], **both[0]["rope_parameters"]} == both[0]["rope_parameters"]
    assert read_config(tmp_path) == read_config(folder)


def read_or_none(folder):
    try:
        return read_config(folder)
    except ValueError:
        return None


SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "llama3_tied", "qwen2_sliding", "qwen3", "mistral"])
def test_missing_fields_take_the_defaults_of_transformers(folder_of, tmp_path, name):
    """Fails if a field that config.json leaves out is read as another value than transformers' default.

    With 64 heads no default of num_key_value_heads is the number of heads.
    """
    content = {**json.loads((folder_of(name) / "config.json").read_text()), "num_attention_heads": 64}
    content["hidden_size"] = 128
    wrong = {}
    for field in sorted(content.keys() - {"architectures", "model_type"}):
        (tmp_path / field / "full").mkdir(parents=True)
        edit = {key: value for key, value in content.items() if key != field}
        (tmp_path / field / "config.json").write_text(json.dumps(edit))
        try:
            transformers.AutoConfig.from_pretrained(tmp_path / field).save_pretrained(tmp_path / field / "full")
        except (StrictDataclassError, ValueError):
            continue
        got, want = read_or_none(tmp_path / field), read_or_none(tmp_path / field / "full")
        if got != want and not (got is None and field in SIZES):
            wrong[field] = got, want
    assert wrong == {}


# what the papers and cards of these models say
GEMMA_SHARED = {"norm_offset": 1.0, "scale_embedding": True, "activation": "gelu", "tied_head": True, "head_dim": 256}
SETTINGS = {
    "gemma-2-2b": {
        **GEMMA_SHARED,
        "local_pattern": (True, False),
        "sliding_window": 4096,
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
        "query_scale": 1 / 16,
        "rope_theta_local": 0.0,
    },
    "gemma-2b": {**GEMMA_SHARED, "num_kv_heads": 1, "post_norms": False, "final_softcap": 0.0},
    "gemma-3-4b": {
        **GEMMA_SHARED,
        "vocab_size": 262208,
        "num_heads": 8,
        "num_kv_heads": 4,
        "qk_norm": True,
        "local_pattern": (True,) * 5 + (False,),
        "rope_theta": 1e6,
        "rope_theta_local": 1e4,
        "rope_scaling": RopeScaling("linear", 8.0),
    },
    "Llama-3.2-1B": {
        "tied_head": True,
        "head_dim": 64,
        "norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling("llama3", 32.0, 8192, 1.0, 4.0),
    },
    "SmolLM2-135M": {"head_dim": 64, "num_kv_heads": 3, "tied_head": True, "rope_theta": 1e5, "activation": "silu"},
    "Qwen2.5-7B": {
        "head_dim": 128,
        "qkv_bias": True,
        "tied_head": False,
        "sliding_window": 0,
        "local_pattern": (False,),
    },
    "Mistral-7B-v0.1": {"head_dim": 128, "sliding_window": 4096, "local_pattern": (True,), "qkv_bias": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_released_configs(tmp_path, name):
    """Fails if a field of a published config.json is refused or misread; transformers' own default fills the gaps."""
    config = read_config(hf_models.released_config(name, tmp_path))
    assert {key: getattr(config, key) for key in SETTINGS[name]} == SETTINGS[name]
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    assert read_config(tmp_path / "full") == config


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 30.0}
REFUSED = [
    ("llama2", {"architectures": ["FancyForCausalLM"]}, "FancyForCausalLM"),
    ("llama2", {"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
    ("llama2", {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ("llama2", {"architectures": ...}, "architectures"),
    ("llama2", {"hidden_size": ...}, "hidden_size"),
    ("llama2", {"clever_new_norm": 3}, "clever_new_norm"),
    ("llama2", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("gemma2", {"attention_bias": True}, "attention_bias"),
    ("llama2", {"mlp_bias": True}, "mlp_bias"),
    ("llama2", {"hidden_act": "relu"}, "relu"),
    ("llama2", {"hidden_act": "gelu_new"}, "gelu_new"),
    ("llama2", {"hidden_act": ["silu"]}, "activation"),
    ("gemma2", {"hidden_activation": None}, "activation None"),
    ("gemma2", {"hidden_activation": "relu"}, "relu"),
    ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "differ"),
    ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 7}, "layer_types"),
    ("gemma3", {"layer_types": ["full_attention"] * 6}, "layer_types"),
    (
        "gemma3",
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}},
        "sliding layers have rope type 'linear'",
    ),
    (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"type": "linear"}}},
        "sliding layers have rope type 'linear'",
    ),
    ("gemma3", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "'rope_type' .* is not supported"),
    ("gemma3", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 8.0}}, "call it rope_type"),
    ("gemma3", {"model_type": "gemma3"}, "'model_type' is 'gemma3', want 'gemma3_text' for Gemma3ForCausalLM"),
    ("gemma3", {"layer_types": ..., "sliding_window_pattern": 0}, "'sliding_window_pattern' is 0, want a whole number"),
    ("gemma3", {"layer_types": "sliding_attention"}, "layer_types"),
    ("gemma2", {"sliding_window": 0}, "'sliding_window' is 0, want a whole number of at least 1"),
    ("mistral", {"sliding_window": "4096"}, "'sliding_window' is '4096', want a whole number"),
    ("mistral", {"sliding_window": True}, "'sliding_window' is True, want a whole number"),
    ("qwen2_sliding", {"layer_types": ..., "max_window_layers": None}, "'max_window_layers' is None, want a whole"),
    ("qwen2_sliding", {"use_sliding_window": "false"}, "'use_sliding_window' is 'false', want true or false"),
    ("llama2", {"tie_word_embeddings": "false"}, "'tie_word_embeddings' is 'false', want true or false"),
    ("llama2", {"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan, want a number above 0"),
    ("llama2", {"rms_norm_eps": None}, "'rms_norm_eps' is None, want a number above 0"),
    ("llama2", {"max_position_embeddings": "96"}, "'max_position_embeddings' is '96', want a whole number"),
    ("llama2", {"rope_parameters": ..., "rope_theta": None}, "'rope_theta' is None, want a number above 0"),
    ("llama2", {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "'rope_theta' is 1000"),
    ("llama2", {"rope_parameters": {"full_attention": LINEAR}}, "'full_attention' .* is not supported"),
    ("llama2", {"rope_parameters": {"rope_type": None, "rope_theta": 30.0}}, "rope type None"),
    ("llama2", {"rope_parameters": [LINEAR]}, "'rope_parameters' is .*, want an object"),
    ("gemma3", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping"),
    ("gemma3_multimodal", {"text_config": ...}, "text_config"),
    ("llama2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama_reward", {"id2label": {"0": "bad", "1": "good"}}, "2 labels"),
    ("llama_reward", {"id2label": ...}, "2 labels"),
    *(
        ("llama2", {"rope_parameters": {"rope_theta": 300.0, "factor": 2.0, **parameters}}, named)
        for parameters, named in (
            ({"rope_type": "dynamic"}, "dynamic"),
            ({"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}, "longrope"),
            ({"rope_type": "linear", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
            ({"rope_type": "linear", "clever_factor": 3.0}, "clever_factor"),
            ({"rope_type": "linear", "factor": "2.0"}, "'factor' is '2.0', want a number above 0"),
            ({"rope_type": "linear", "factor": None}, "'factor' is None, want a number above 0"),
            ({"rope_type": "llama3", "high_freq_factor": 4.0}, "'low_freq_factor' is missing, want a number above 0"),
            ({"rope_type": "yarn", "original_max_position_embeddings": "24"}, "'yarn' needs original_max_.*: got '24'"),
            ({"rope_type": "yarn", "attention_factor": 0}, "'attention_factor' is 0, want a number above 0"),
            ({"rope_type": "yarn", "original_max_position_embeddings": 24, "truncate": False}, "truncate"),
        )
    ),
    ("llama2", {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
]


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED, ids=lambda x: x if isinstance(x, str) else "-")
def test_unsupported_fields_are_refused_by_name(folder_of, tmp_path, name, changes, named):
    """Fails if a field that changes the result is ignored."""
    edited(folder_of(name), tmp_path, **changes)
    with pytest.raises(ValueError, match=named) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


LLAMA3 = {name: value for name, value in hf_models.LLAMA3_ROPE.items() if name != "original_max_position_embeddings"}
MSCALES = {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": None, "attention_factor": None}
SAME = [
    ("llama2", {"rope_theta": None}),
    ("llama2", {"rope_theta": 999.0}),
    ("llama2", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 50.0}),
    ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama2", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 50.0}),
    ("llama2", {"rope_scaling": {}}),
    ("llama2", {"rope_parameters": LLAMA3}),
    ("llama2", {"rope_parameters": {**hf_models.YARN_ROPE, **MSCALES}}),
    ("llama2", {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 30.0}}),
    ("llama2", {"hidden_act": "gelu"}),
    ("qwen2", {"attention_bias": True}),
    ("qwen2", {"attention_bias": False}),
    ("qwen2_sliding", {"use_sliding_window": False}),
    ("mistral", {"attention_bias": True}),
    ("gemma", {"hidden_act": "gelu"}),
    ("gemma", {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"}),
    ("gemma2", {"hidden_activation": "gelu"}),
    ("gemma2", {"hidden_activation": ..., "hidden_act": "silu"}),
    ("gemma2", {"sliding_window": None}),
    ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gemma3", {"rope_parameters": ..., "rope_theta": 77.0, "rope_local_base_freq": 33.0}),
    ("gemma3", {"rope_theta": 77.0, "rope_local_base_freq": 33.0}),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 77.0}}, "rope_local_base_freq": 33.0}),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 77.0}, "full_attention": None}}),
]


def transformers_computes(folder):
    """Frequencies of full and local layers, scale, windows, activation and biases of transformers' model."""
    architecture = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = architecture._from_config(architecture.config_class.from_pretrained(folder))
    rotary, layer = model.model.rotary_emb, model.model.layers[0]
    full = getattr(rotary, "full_attention_inv_freq", None)
    window = getattr(model.config, "sliding_window", None)
    biases = [name for name, _ in layer.named_parameters() if name.endswith("bias")]
    return {
        "full": rotary.inv_freq if full is None else full,
        "local": None if full is None else rotary.sliding_attention_inv_freq,
        "scale": getattr(rotary, "attention_scaling", 1.0),
        "windows": [getattr(layer.self_attn, "sliding_window", window) for layer in model.model.layers],
        "activated": layer.mlp.act_fn(hf_models.torch.linspace(-3, 3, 13)),
        "biases": [f"self_attn.{x}_proj.bias" for x in "qkv"] == biases or biases,
    }


@pytest.mark.parametrize(("name", "changes"), SAME, ids=str)
def test_fields_mean_what_transformers_computes(folder_of, tmp_path, name, changes):
    """Fails when rope_theta beats rope_parameters, rope_scaling is merged into them, or Gemma's gelu is another one."""
    config = read_config(edited(folder_of(name), tmp_path, **changes))
    want = transformers_computes(tmp_path)
    full = rope.inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(full, want["full"], rtol=1e-6)
    if want["local"] is not None:
        local = rope.inverse_frequencies(config.head_dim, config.rope_theta_local, RopeScaling())
        np.testing.assert_allclose(local, want["local"], rtol=1e-6)
    assert rope.attention_scale(config.rope_scaling) == pytest.approx(want["scale"])
    assert [config.sliding_window if local else None for local in config.is_local] == want["windows"]
    activated = transformer._ACTIVATIONS[config.activation](jnp.linspace(-3, 3, 13))
    np.testing.assert_allclose(activated, want["activated"], atol=2e-6)
    assert want["biases"] == (config.qkv_bias or [])


def test_exact_gelu_is_written_as_gelu(folder_of, tmp_path):
    """Fails when the exact form comes back as the tanh form, or the first Gemma, which lacks it, is written with it."""
    config = read_config(edited(folder_of("gemma2"), tmp_path, hidden_activation="gelu"))
    assert config.activation == "gelu_exact"
    assert hf_config.from_json(hf_config.to_json(config, "float32")) == config
    first = dataclasses.replace(read_config(folder_of("gemma")), activation="gelu_exact")
    with pytest.raises(ValueError, match="no Hugging Face architecture has these settings"):
        hf_config.to_json(first, "float32")


@pytest.mark.parametrize("given", [{"hidden_act": "silu"}, {"hidden_act": "silu", "hidden_activation": None}], ids=str)
def test_the_activation_of_the_first_gemma(folder_of, tmp_path, given):
    """Fails if the default of hidden_activation replaces the value of hidden_act."""
    edited(folder_of("gemma"), tmp_path, **{"hidden_activation": ..., **given})
    assert read_config(tmp_path).activation == "silu"


def test_num_labels_counts_without_names(folder_of, tmp_path):
    """Fails if num_labels is ignored in a reward model without label names."""
    edited(folder_of("llama_reward"), tmp_path, id2label=..., label2id=..., num_labels=1)
    assert read_config(tmp_path).head == "scalar"


@pytest.mark.parametrize("name", presets.MODELS)
def test_settings_of_the_computation_do_not_prevent_an_export(name):
    """Fails when remat, dtype or stacks count as part of the architecture: a job with remat could not be exported."""
    model = presets.MODELS[name]
    computed = dataclasses.replace(model, remat="full", dtype="bfloat16", layer_groups=(2, model.num_layers - 2))
    assert hf_config.to_json(computed, "float32") == hf_config.to_json(model, "float32")
