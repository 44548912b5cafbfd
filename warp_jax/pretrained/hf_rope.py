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
YARN_FIELDS = {"mscale", "mscale_all_dim", "truncate"}  # read here, but not stored in RopeScaling


def read_rope(fields: Json) -> dict[str, Any]:
    """Rotary settings as keyword arguments of TransformerConfig, from config.json's fields with their defaults.

    As in transformers 5, rope_scaling replaces rope_parameters; a rope_theta in either replaces the field.
    """
    scaling, parameters = (_mapping(fields, name) for name in ("rope_scaling", "rope_parameters"))
    if "rope_local_base_freq" not in fields:
        rope = {"rope_theta": fields["rope_theta"], **(scaling or parameters)}
        return {"rope_theta": _number(rope, "rope_theta"), "rope_scaling": _scaling(rope, fields)}
    if "type" in scaling and "rope_type" not in scaling:
        raise ValueError(
            f"rope_scaling has the type {scaling['type']!r}, which transformers 5 ignores; call it rope_type"
        )
    _check_names(parameters, {"full_attention", "sliding_attention"})
    rope = {"rope_theta": fields["rope_theta"], **_mapping(parameters, "full_attention"), **scaling}
    local = {"rope_theta": fields["rope_local_base_freq"], **_mapping(parameters, "sliding_attention")}
    if _kind(local) != "default":
        raise ValueError(f"sliding layers have rope type {_kind(local)!r}, want 'default'")
    _check_names(local, {"rope_type", "type", "rope_theta"})
    return {
        "rope_theta": _number(rope, "rope_theta"),
        "rope_scaling": _scaling(rope, fields),
        "rope_theta_local": _number(local, "rope_theta"),
    }


def is_positive(value: Any) -> bool:
    """Return True for a finite number above 0."""
    return type(value) in (int, float) and 0 < value < 1e300


def _scaling(parameters: Json, fields: Json) -> RopeScaling:
    kind = _kind(parameters)
    if kind not in OUR_NAMES:
        raise ValueError(f"rope type {kind!r} is not supported, want one of {', '.join(OUR_NAMES)}")
    _check_names(parameters, {*OTHER_FIELDS, *OUR_NAMES[kind], *(YARN_FIELDS if kind == "yarn" else ())})
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor is {parameters['partial_rotary_factor']!r}, want 1")
    if kind == "default":
        return RopeScaling()
    factor = _number(parameters, "factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    length = parameters.get(LENGTH, fields["max_position_embeddings"])
    if type(length) is not int or length < 1:
        raise ValueError(f"rope type {kind!r} needs {LENGTH}: got {length!r}, want a whole number of at least 1")
    if kind == "llama3":
        low, high = (_number(parameters, name) for name in ("low_freq_factor", "high_freq_factor"))
        return RopeScaling("llama3", factor, length, low, high)
    if parameters.get("truncate", True) is not True:
        raise ValueError("rope type 'yarn': truncate is false, want true")
    return RopeScaling(
        "yarn",
        factor,
        length,
        beta_fast=_number({"beta_fast": 32, **_without_null(parameters)}, "beta_fast"),
        beta_slow=_number({"beta_slow": 1, **_without_null(parameters)}, "beta_slow"),
        attention_factor=_attention_factor(_without_null(parameters)),
    )


def _attention_factor(parameters: Json) -> float:
    """Factor of yarn on queries and keys; 0 = the default of its paper."""
    if "attention_factor" in parameters:
        return _number(parameters, "attention_factor")
    if not (parameters.get("mscale") and parameters.get("mscale_all_dim")):
        return 0.0
    scales = (_number(parameters, name) for name in ("mscale", "mscale_all_dim"))
    upper, lower = (0.1 * scale * math.log(max(parameters["factor"], 1)) + 1 for scale in scales)
    return upper / lower


def _kind(parameters: Json) -> Any:
    return parameters.get("rope_type", parameters.get("type", "default"))


def _number(parameters: Json, name: str) -> float:
    value: Any = parameters.get(name)
    if not is_positive(value):
        got = f"is {value!r}" if name in parameters else "is missing"
        raise ValueError(f"rope parameter {name!r} {got}, want a number above 0")
    return float(value)


def _mapping(fields: Json, name: str) -> Json:
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"field {name!r} is {value!r}, want an object")
    return value


def _without_null(parameters: Json) -> Json:
    return {name: value for name, value in parameters.items() if value is not None}


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
