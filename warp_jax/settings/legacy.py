"""Configs of earlier versions, brought up to date: other names of the same settings."""

import contextlib
from collections.abc import Mapping
from typing import Any

REASONING = "reasoning_gym:"
MOVED = {  # modules of reward functions
    "warp_jax.math_answers": "warp_jax.rewards.math_answers",
    "warp_jax.reasoning": "warp_jax.data.reasoning_gym",
}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with today's names. Values of a wrong type stay as they are; validation reports them."""
    if not isinstance(config, Mapping):
        raise ValueError(f"config: got a {type(config).__name__}, want groups of settings by name")
    new = dict(config)
    if isinstance(data := new.get("data"), Mapping):
        new["data"] = _with_task(data)
    if isinstance(model := new.get("model"), Mapping) and isinstance(evaluation := new.get("evaluation"), Mapping):
        new["evaluation"] = {"dtype": model.get("dtype"), **evaluation}  # earlier versions had one dtype for both
    if isinstance(parts := new.get("rewards"), Mapping):
        new["rewards"] = {name: _with_new_source(part) for name, part in parts.items()}
    return new | {"gold": _with_new_source(new["gold"])} if "gold" in new else new


def split_task(source: str) -> tuple[str, dict[str, Any]]:
    """Split 'reasoning_gym:TASK?name=value&...' into the source without its query, and the task's options.

    Whole numbers, decimal numbers and true/false are converted, commas make a list, anything else stays text.
    """
    source, _, query = source.partition("?")
    options: dict[str, Any] = {}
    for part in query.split("&") if query else []:
        name, equals, text = part.partition("=")
        if not equals or name in options:
            raise ValueError(f"config.data.source: got {part!r}, want name=value, each name once; or set data.task")
        values = [_typed(item) for item in text.split(",")]
        options[name] = values if len(values) > 1 else values[0]
    return source, options


def _typed(text: str) -> Any:
    """The value that is written like the text: '7' is 7, but '007' stays text."""
    values: dict[str, Any] = {"true": True, "false": False}
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            values.setdefault(str(kind(text)), kind(text))
    return values.get(text.lower(), text)


def _with_task(data: Mapping[str, Any]) -> dict[str, Any]:
    source, task = data.get("source"), data.get("task", {})
    if isinstance(source, str) and source.startswith(REASONING) and "?" in source:
        source, task = split_task(source)  # its options replace those of data.task
    return {**data, "source": source, "task": task}


def _with_new_source(part: Any) -> Any:
    if not isinstance(part, Mapping) or not isinstance(part.get("source"), str):
        return part
    module, colon, name = part["source"].partition(":")
    return {**part, "source": f"{MOVED.get(module, module)}{colon}{name}"}
