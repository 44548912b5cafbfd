"""Rotary settings in a config.json: the older fields rope_theta and rope_scaling, and the newer rope_parameters."""

import math
from collections.abc import Mapping
from typing import Any

from warp_jax.models.rope import RopeScaling
from warp_jax.models.transformer import TransformerConfig

Json = Mapping[str, Any]

SCALING_FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def read_rope(fields: Json) -> dict[str, Any]:
    """The rotary settings of TransformerConfig."""
    parameters = fields["rope_parameters"] or {}
    shared = {"rope_theta": fields["rope_theta"], **(fields["rope_scaling"] or {})}
    local_theta = fields.get("rope_local_base_freq", 0.0)
    if "full_attention" in parameters or "sliding_attention" in parameters:
        everywhere = {**shared, **(parameters.get("full_attention") or {})}
        local = parameters.get("sliding_attention") or {}
        _check_names(local, {"rope_type", "type", "rope_theta"})
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"sliding layers have rope type {local['rope_type']!r}, want 'default'")
        local_theta = local.get("rope_theta", local_theta)
    else:
        everywhere = {**shared, **parameters}
    result = {
        "rope_theta": float(everywhere["rope_theta"]),
        "rope_scaling": _scaling(everywhere, fields["max_position_embeddings"]),
    }
    return {**result, "rope_theta_local": float(local_theta)} if "rope_local_base_freq" in fields else result


def _scaling(parameters: Json, max_length: int | None) -> RopeScaling:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in SCALING_FIELDS:
        raise ValueError(f"rope type {kind!r} is unknown, want one of {', '.join(SCALING_FIELDS)}")
    _check_names(parameters, {"rope_type", "type", "rope_theta", "partial_rotary_factor", *SCALING_FIELDS[kind]})
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor is {parameters['partial_rotary_factor']!r}, want 1")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", float(parameters["factor"]))
    length = parameters.get("original_max_position_embeddings") or max_length
    if length is None:
        raise ValueError(f"rope type {kind!r} needs original_max_position_embeddings")
    if kind == "llama3":
        low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
        return RopeScaling("llama3", float(parameters["factor"]), length, low, high)
    if parameters.get("truncate", True) is not True:
        raise ValueError("yarn with truncate false is not implemented")
    return RopeScaling(
        "yarn",
        float(parameters["factor"]),
        length,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        attention_factor=_attention_factor(parameters),
    )


def _attention_factor(parameters: Json) -> float:
    """Yarn's scale of queries and keys; 0 = the default of its paper."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    scales = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if not all(scales):
        return 0.0
    upper, lower = (0.1 * float(scale or 0) * math.log(max(parameters["factor"], 1)) + 1 for scale in scales)
    return upper / lower


def _check_names(parameters: Json, known: set[str]) -> None:
    for name, value in parameters.items():
        if name not in known and value is not None:
            raise ValueError(f"rope parameter {name!r} ({value!r}) is unknown and might change the maths")


def rope_fields(config: TransformerConfig) -> dict[str, Any]:
    """The older fields, which all versions of transformers read."""
    fields: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_theta_local:
        fields["rope_local_base_freq"] = config.rope_theta_local
    scaling = config.rope_scaling
    if scaling.kind != "none":
        values = {
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor or None,
        }
        used = {name: values[name] for name in SCALING_FIELDS[scaling.kind] & values.keys() if values[name] is not None}
        fields["rope_scaling"] = {"rope_type": scaling.kind, **dict(sorted(used.items()))}
    return fields


def normal_scaling(scaling: RopeScaling) -> RopeScaling:
    """Without the values that its kind does not use."""
    if scaling.kind == "none":
        return RopeScaling()
    used = {
        "linear": ("factor",),
        "llama3": ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
        "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor"),
    }[scaling.kind]
    return RopeScaling(scaling.kind, **{name: getattr(scaling, name) for name in used})
