"""Read and write the rotary settings of a config.json: rope_theta and rope_scaling, or the newer rope_parameters."""

import math
from collections.abc import Mapping
from typing import Any

from warp_jax.models.rope import RopeScaling
from warp_jax.models.transformer import TransformerConfig

Json = Mapping[str, Any]

LENGTH = "original_max_position_embeddings"
OUR_NAMES: dict[str, dict[str, str]] = {  # by rope type: names in RopeScaling of the fields that it stores
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "high_freq_factor": "high_frequency_factor",
        "low_freq_factor": "low_frequency_factor",
        LENGTH: "original_length",
    },
    "yarn": {
        **{name: name for name in ("attention_factor", "beta_fast", "beta_slow", "factor")},
        LENGTH: "original_length",
    },
}
OTHER_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
YARN_FIELDS = {"mscale", "mscale_all_dim", "truncate"}  # that only change how the stored fields are read


def read_rope(fields: Json) -> dict[str, Any]:
    """Rotary settings as keyword arguments of TransformerConfig, from config.json's fields with their defaults."""
    parameters = fields["rope_parameters"] or {}
    shared = {"rope_theta": fields["rope_theta"], **(fields["rope_scaling"] or {})}
    global_rope, local_theta = {**shared, **parameters}, fields.get("rope_local_base_freq", 0.0)
    if "full_attention" in parameters or "sliding_attention" in parameters:
        global_rope = {**shared, **(parameters.get("full_attention") or {})}
        local_rope = parameters.get("sliding_attention") or {}
        _check_names(local_rope, {"rope_type", "type", "rope_theta"})
        if local_rope.get("rope_type", "default") != "default":
            raise ValueError(f"sliding layers have rope type {local_rope['rope_type']!r}, want 'default'")
        local_theta = local_rope.get("rope_theta", local_theta)
    result = {
        "rope_theta": float(global_rope["rope_theta"]),
        "rope_scaling": _scaling(global_rope, fields["max_position_embeddings"]),
    }
    return {**result, "rope_theta_local": float(local_theta)} if "rope_local_base_freq" in fields else result


def _scaling(parameters: Json, max_length: int | None) -> RopeScaling:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in OUR_NAMES:
        raise ValueError(f"rope type {kind!r} is not supported, want one of {', '.join(OUR_NAMES)}")
    _check_names(parameters, {*OTHER_FIELDS, *OUR_NAMES[kind], *(YARN_FIELDS if kind == "yarn" else ())})
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor is {parameters['partial_rotary_factor']!r}, want 1")
    if kind == "default":
        return RopeScaling()
    factor = float(parameters["factor"])
    if kind == "linear":
        return RopeScaling("linear", factor)
    length = parameters.get(LENGTH) or max_length
    if length is None:
        raise ValueError(f"rope type {kind!r} needs {LENGTH}")
    if kind == "llama3":
        low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
        return RopeScaling("llama3", factor, length, low, high)
    if parameters.get("truncate", True) is not True:
        raise ValueError("rope type 'yarn': truncate is false, want true")
    return RopeScaling(
        "yarn",
        factor,
        length,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        attention_factor=_attention_factor(parameters),
    )


def _attention_factor(parameters: Json) -> float:
    """Factor of yarn on queries and keys; 0 = the default of its paper."""
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
            raise ValueError(f"rope parameter {name!r} ({value!r}) is not supported: it might change the result")


def rope_fields(config: TransformerConfig) -> dict[str, Any]:
    """The older rope fields of config.json, which all versions of transformers read."""
    fields: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_theta_local:
        fields["rope_local_base_freq"] = config.rope_theta_local
    scaling = config.rope_scaling
    if scaling.kind != "none":
        values = {name: getattr(scaling, ours) for name, ours in OUR_NAMES[scaling.kind].items()}
        values = {name: value for name, value in values.items() if value or name != "attention_factor"}
        fields["rope_scaling"] = {"rope_type": scaling.kind, **values}
    return fields


def normal_scaling(scaling: RopeScaling) -> RopeScaling:
    """Reset the values that this kind of scaling does not use to their defaults."""
    used = OUR_NAMES.get(scaling.kind, {}).values()
    return RopeScaling(scaling.kind, **{name: getattr(scaling, name) for name in used})
