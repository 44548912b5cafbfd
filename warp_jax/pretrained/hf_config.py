"""Convert the config.json of a Hugging Face folder to a TransformerConfig, and back.

Each field is read, ignored because it does not change the logits, or rejected by name. Unknown fields are rejected.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained.hf_rope import Json, is_positive, normal_scaling, read_rope, rope_fields
from warp_jax.storage import model_files
from warp_jax.storage.model_files import CONFIG


class Family(NamedTuple):
    """One architecture of the transformers library."""

    class_name: str  # prefix of its classes, before 'ForCausalLM'
    settings: Mapping[str, Any] = {}  # of TransformerConfig, fixed for the family
    defaults: Mapping[str, Any] = {}  # optional fields, in addition to COMMON


GEMMA = {"norm_offset": 1.0, "scale_embedding": True}
GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA_1_ACTIVATION = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None}  # files have one or both
GEMMA_2_DEFAULTS = {
    **GEMMA_DEFAULTS,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "layer_types": None,
}
QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

WITHOUT_MEANING = {"attention_bias": None}  # transformers ignores it for these families

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", defaults={"sliding_window": 4096, "num_key_value_heads": 8, **WITHOUT_MEANING}),
    "qwen2": Family("Qwen2", {"qkv_bias": True}, {**QWEN_DEFAULTS, **WITHOUT_MEANING}),
    "qwen3": Family("Qwen3", {"qk_norm": True}, {**QWEN_DEFAULTS, "head_dim": 128}),
    "gemma": Family("Gemma", GEMMA, {**GEMMA_DEFAULTS, "num_key_value_heads": 16, **GEMMA_1_ACTIVATION}),
    "gemma2": Family("Gemma2", {**GEMMA, "post_norms": True}, GEMMA_2_DEFAULTS),
    "gemma3_text": Family(
        "Gemma3",
        {**GEMMA, "post_norms": True, "qk_norm": True},
        {
            **GEMMA_2_DEFAULTS,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
    ),
}
OUR_NAMES = {  # names in TransformerConfig of fields with the same value there
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "max_position_embeddings": None,
}
COUNTS = {  # fields that are whole numbers, and their smallest value
    **dict.fromkeys((*REQUIRED, "num_key_value_heads", "head_dim", "sliding_window"), 1),
    **{"max_position_embeddings": 1, "sliding_window_pattern": 1, "max_window_layers": 0},
}
NUMBERS = ("rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
MAY_BE_NULL = {"num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings", *NUMBERS[1:]}
# fields with only one supported meaning; other values are rejected, and the last one is named in the error
FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "rope_interleaved"), (False,)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), (False,)),
    **dict.fromkeys(("use_bidirectional_attention", "use_mrope", "attn_output_gate"), (None, False)),
    **dict.fromkeys(("quantization_config", "cross_attention_hidden_size"), (None,)),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (None, 1, 1.0),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": (None, {}),
}
# fields that do not change the logits of a text
_IGNORED_FIELDS = (
    "_name_or_path architectures attention_dropout begin_suppress_tokens bad_words_ids bos_token_id "
    "cache_implementation decoder_start_token_id diversity_penalty do_sample dtype early_stopping eos_token_id "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id hidden_dropout id2label initializer_range is_decoder is_llama_config label2id "
    "length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences num_labels output_attentions output_hidden_states output_scores pad_token_id prefix "
    "problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype "
    "torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 "
    "use_cache _attn_implementation_autoset _sliding_window_pattern"
)
IGNORED = frozenset(_IGNORED_FIELDS.split())
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
HEADS = {"language": "ForCausalLM", "scalar": "ForSequenceClassification"}  # suffixes of class names


def read_config(folder: Path) -> TransformerConfig:
    """Read the settings of the model in a folder. A ValueError names the file and the field that is not supported."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG}, want a Hugging Face model folder")
    content = model_files.read_config(folder)
    try:
        return from_json(content)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error


def from_json(content: Json) -> TransformerConfig:
    """Convert the content of a config.json to settings."""
    content, head = _text_model(content)
    family = FAMILIES[content["model_type"]]
    fields = {**COMMON, **family.defaults, **content}
    _check_fields(content, {*REQUIRED, *COMMON, *family.defaults})
    if missing := [name for name in REQUIRED if name not in fields]:
        raise ValueError(f"field {missing[0]!r} is missing")
    _check_types(fields)
    if content["model_type"] == "gemma3_text" and fields["attn_logit_softcapping"]:
        raise ValueError("field 'attn_logit_softcapping' is set, want null: transformers ignores its value for Gemma 3")
    labels = len(content.get("id2label") or range(content.get("num_labels", 2)))
    if head == "scalar" and labels != 1:
        raise ValueError(f"model has {labels} labels, want a reward model with num_labels = 1")
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    scalar = fields.get("query_pre_attn_scalar")
    return TransformerConfig(
        **{ours: fields[name] for name, ours in OUR_NAMES.items()},
        activation=_activation(fields),
        query_scale=float(scalar) ** -0.5 if scalar else 0.0,
        attention_softcap=fields.get("attn_logit_softcapping") or 0.0,
        final_softcap=fields.get("final_logit_softcapping") or 0.0,
        tied_head=bool(fields["tie_word_embeddings"]) and head == "language",
        head=head,
        **family.settings,
        **_read_windows(fields),
        **read_rope(fields),
    )


def to_json(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """Convert settings to a config.json for transformers 4.5x and 5.x; `from_json` is the inverse.

    dtype: of the weights, such as 'bfloat16'. Raises ValueError if no family has these settings.
    """
    model_type = _family_of(config)
    text = "Text" if model_type == "gemma3_text" and config.head == "scalar" else ""
    result = {
        "architectures": [f"{FAMILIES[model_type].class_name}{text}{HEADS[config.head]}"],
        "model_type": model_type,
        "torch_dtype": dtype,
        **{name: getattr(config, ours) for name, ours in OUR_NAMES.items()},
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": 131_072,
        **_family_fields(config, FAMILIES[model_type]),
        **rope_fields(config),
        **({"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if config.head == "scalar" else {}),
    }
    if from_json(result) != _normal(config):
        raise ValueError(f"model: no Hugging Face architecture has these settings; the closest is {model_type}")
    return result


def _text_model(content: Json) -> tuple[Json, str]:
    """The fields of the language model, and its head: "language" or "scalar"."""
    if not isinstance(names := content.get("architectures"), list) or not names:
        raise ValueError("field 'architectures' is missing, want the config.json of a Hugging Face model")
    architecture = str(names[0])
    if architecture == "Gemma3ForConditionalGeneration":  # a model with images: read its text tower
        text = content.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError("field 'text_config' is missing, want the settings of the text tower")
        tied = content.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
        return {**text, "model_type": "gemma3_text", "tie_word_embeddings": tied}, "language"
    for model_type, family in FAMILIES.items():
        for head, suffix in HEADS.items():
            if architecture in (f"{family.class_name}{suffix}", f"{family.class_name}Text{suffix}"):
                if (got := content.get("model_type")) != model_type:
                    raise ValueError(f"field 'model_type' is {got!r}, want {model_type!r} for {architecture}")
                return content, head
    known = ", ".join(f"{family.class_name}ForCausalLM" for family in FAMILIES.values())
    raise ValueError(
        f"architecture {architecture!r} is not supported, want one of {known}, or their ForSequenceClassification"
    )


def _check_fields(content: Json, known: set[str]) -> None:
    for name, value in content.items():
        if name in FIXED and name not in known and value not in FIXED[name]:
            raise ValueError(f"field {name!r} is {value!r}, want {FIXED[name][-1]!r}: other values are not supported")
        if name not in known and name not in FIXED and name not in IGNORED:
            raise ValueError(f"field {name!r} ({value!r}) is not supported: it might change the result")


def _check_types(fields: Json) -> None:
    for name, value in fields.items():
        if value is None and name in MAY_BE_NULL:
            continue
        if name in COUNTS and not (type(value) is int and value >= COUNTS[name]):
            raise ValueError(f"field {name!r} is {value!r}, want a whole number of at least {COUNTS[name]}")
        if name in NUMBERS and not is_positive(value):
            raise ValueError(f"field {name!r} is {value!r}, want a number above 0")
        if name in ("tie_word_embeddings", "use_sliding_window") and not isinstance(value, bool):
            raise ValueError(f"field {name!r} is {value!r}, want true or false")


def _activation(fields: Json) -> str:
    names = [fields.get("hidden_activation", fields["hidden_act"])]
    if fields["model_type"] == "gemma":  # has both fields, and its older files say "gelu" for the tanh form
        names = [fields["hidden_act"], names[0] or fields["hidden_act"]]
        names = ["gelu_pytorch_tanh" if name == "gelu" else name for name in names]
    if len(set(map(str, names))) > 1:
        raise ValueError(f"fields 'hidden_act' and 'hidden_activation' differ: {names[0]!r} and {names[1]!r}")
    if str(names[0]) not in ACTIVATIONS:
        raise ValueError(f"activation {names[0]!r} is not supported, want one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[names[0]]


def _read_windows(fields: Json) -> dict[str, Any]:
    """Sliding window and pattern of local layers as keyword arguments of TransformerConfig."""
    window, layers = fields.get("sliding_window"), fields["num_hidden_layers"]
    if not window or not fields.get("use_sliding_window", True):
        return {}
    if (types := fields.get("layer_types")) is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
            raise ValueError(
                f"field 'layer_types' is {types!r}, want sliding_attention or full_attention for each layer"
            )
        local = [kind == "sliding_attention" for kind in types]
    elif "max_window_layers" in fields:
        local = [i >= fields["max_window_layers"] for i in range(layers)]
    elif fields["model_type"] == "mistral":
        local = [True] * layers
    else:
        every = fields.get("sliding_window_pattern", 2)
        local = [(i + 1) % every > 0 for i in range(layers)]
    return {"sliding_window": window, "local_pattern": shortest_pattern(local)} if any(local) else {}


def shortest_pattern(local: list[bool]) -> tuple[bool, ...]:
    """The shortest sequence whose repetition starts with `local`."""
    periods = range(1, len(local) + 1)
    period = next(p for p in periods if all(value == local[i % p] for i, value in enumerate(local)))
    return tuple(local[:period])


def _family_of(config: TransformerConfig) -> str:
    if config.norm_offset:
        return "gemma" if not config.post_norms else "gemma3_text" if config.qk_norm else "gemma2"
    if config.qk_norm or config.qkv_bias:
        return "qwen3" if config.qk_norm else "qwen2"
    return "mistral" if all(config.local_pattern) else "llama"


def _family_fields(config: TransformerConfig, family: Family) -> dict[str, Any]:
    """Activation, query scale, soft-caps and windows, limited to the fields that the family has."""
    known = family.defaults if "hidden_activation" in family.defaults else {"hidden_act", *family.defaults}
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation]
    fields = {
        "hidden_act": activation,
        "hidden_activation": activation,
        "query_pre_attn_scalar": _query_scalar(config),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
        "sliding_window": config.sliding_window or None,
        "use_sliding_window": config.sliding_window > 0,
        "max_window_layers": config.is_local.index(True) if any(config.is_local) else config.num_layers,
        "layer_types": ["sliding_attention" if local else "full_attention" for local in config.is_local],
    }
    return {name: value for name, value in fields.items() if name in known}


def _normal(config: TransformerConfig) -> TransformerConfig:
    """The same settings in the form that `from_json` returns, for a comparison."""
    has_scalar = "query_pre_attn_scalar" in FAMILIES[_family_of(config)].defaults
    pattern = shortest_pattern(list(config.is_local))
    return dataclasses.replace(
        config,
        query_scale=float(_query_scalar(config)) ** -0.5 if has_scalar else config.query_scale,
        local_pattern=pattern,
        sliding_window=config.sliding_window if any(pattern) else 0,
        tied_head=config.tied_head and config.head == "language",
        rope_scaling=normal_scaling(config.rope_scaling),
        layer_groups=(),
        dtype="float32",
        remat="none",
    )


def _query_scalar(config: TransformerConfig) -> float:
    """Field query_pre_attn_scalar, a whole number if it is one up to float error."""
    value = (config.query_scale or config.head_dim**-0.5) ** -2
    return round(value) if abs(value - round(value)) < 1e-6 * value else value
