"""Settings that are read only with some values of another setting: elsewhere they must keep their defaults."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel


class Rule(NamedTuple):
    """Settings, by path, that are read only if `is_read` holds for the value of another setting."""

    names: tuple[str, ...]
    other: str
    is_read: Callable[[Any], bool]


RULES = (
    *(
        Rule((f"{part}.learning_rate_steps", f"{part}.learning_rate_end"), schedule, lambda kind: kind != "constant")
        for part in ("sft", "reward_model", "rl")
        for schedule in (f"{part}.learning_rate_schedule",)
    ),
    Rule(("model.lora.alpha", "model.lora.targets"), "model.lora.rank", lambda rank: rank > 0),
    Rule(("rl.kl_steps", "rl.kl_coef_end"), "rl.kl_schedule", lambda kind: kind in ("linear", "cosine")),
    Rule(("rl.kl_target", "rl.kl_gain"), "rl.kl_schedule", lambda kind: kind == "adaptive"),
    Rule(("rl.clip_ratio", "rl.clip_low", "rl.clip_high"), "rl.updates_per_rollout", lambda updates: updates > 1),
    Rule(
        ("warp.bema.ema_power", "warp.bema.bias_power", "warp.bema.lag"), "warp.anchor", lambda anchor: anchor == "bema"
    ),
    Rule(
        ("evaluation.text_field", "evaluation.text_rows", "evaluation.text_tokens"),
        "evaluation.text",
        lambda source: source != "",
    ),
)


class Unread(NamedTuple):
    """A setting that nothing reads and that is not at its default."""

    run: int | None  # number of the entry of warp.runs that sets it, from 0; None: the config itself
    name: str
    value: Any
    default: Any
    other: str
    other_value: Any

    def message(self) -> str:
        """The line for the user, without "config."."""
        place = "" if self.run is None else f"warp.runs[{self.run}]: "
        return (
            f"{place}{self.name}: got {self.value!r}, want {self.default!r}, the default: nothing reads it with "
            f"{self.other} = {self.other_value!r}"
        )


def find(settings: BaseModel, runs: Sequence[BaseModel], entries: Sequence[Mapping[str, Any]]) -> Iterator[Unread]:
    """Each setting that no run reads, or that the entry of a run sets although this run does not read it.

    runs: the settings of each run. entries: warp.runs, the changes of each run; may be empty.
    """
    for names, other, is_read in RULES:
        values = [_value(run, other) for run in runs]
        for name in names:
            value, default = _value(settings, name), _default(name, type(settings))
            if value != default and not any(map(is_read, values)):
                yield Unread(None, name, value, default, other, values[0])
            for number, changes in enumerate(entries):
                if changes.get(name, default) != default and not is_read(values[number]):
                    yield Unread(number, name, changes[name], default, other, values[number])


def without(found: Sequence[Unread], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Changes, by path, that set what `find` has found to its defaults."""
    dropped = {(unread.run, unread.name) for unread in found}
    kept = [
        {name: value for name, value in entry.items() if (number, name) not in dropped}
        for number, entry in enumerate(entries)
    ]
    return {**{unread.name: unread.default for unread in found if unread.run is None}, "warp.runs": tuple(kept)}


def _value(settings: BaseModel, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), settings)


def _default(path: str, group: type[BaseModel]) -> Any:
    *parents, name = path.split(".")
    for parent in parents:
        group = group.model_fields[parent].annotation  # type: ignore[assignment]  # a group
    return group.model_fields[name].default
