"""Configs of earlier versions, brought up to date: other names of the same settings."""

from collections.abc import Mapping
from typing import Any

REASONING = "reasoning_gym:"
MOVED = {  # modules of reward functions
    "warp_jax.math_answers": "warp_jax.rewards.math_answers",
    "warp_jax.reasoning": "warp_jax.data.reasoning_gym",
}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with today's names. Values of a wrong type stay as they are; validation reports them."""
    new = dict(config)
    if isinstance(data := new.get("data"), Mapping):
        new["data"] = _with_task(data)
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
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _with_task(data: Mapping[str, Any]) -> dict[str, Any]:
    source, task = data.get("source"), data.get("task", {})
    if isinstance(source, str) and source.startswith(REASONING) and "?" in source:
        if task:
            raise ValueError(f"config.data.source: got {source!r} and data.task, want the options in data.task alone")
        source, task = split_task(source)
    return {**data, "source": source, "task": task}


def _with_new_source(part: Any) -> Any:
    if not isinstance(part, Mapping) or not isinstance(part.get("source"), str):
        return part
    module, colon, name = part["source"].partition(":")
    return {**part, "source": f"{MOVED.get(module, module)}{colon}{name}"}
