"""config.json against transformers: old and new forms, defaults, published files, and what is refused by name."""

import dataclasses
import functools
import json

import hf_models
import pytest
import transformers
from hf_models import ALL
from huggingface_hub.errors import StrictDataclassError

from warp_jax.models import presets
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
        content["rope_scaling"] = {**full, "rope_type" if kind == "llama3" else "type": kind}
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
    ("llama2", {"mlp_bias": True}, "mlp_bias"),
    ("llama2", {"hidden_act": "relu"}, "relu"),
    ("llama2", {"hidden_act": "gelu"}, "gelu"),
    ("gemma2", {"hidden_activation": "relu"}, "relu"),
    ("gemma", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "differ"),
    ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 7}, "layer_types"),
    ("gemma3", {"layer_types": ["full_attention"] * 6}, "layer_types"),
    ("gemma3", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}}, "factor"),
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
