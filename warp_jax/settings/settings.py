"""A whole config as one frozen, typed object, and the rules between its groups."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from warp_jax.settings import groups, legacy, unread

PLAIN = {  # pydantic's phrases, and how our messages write them
    r"^Input should be ": "",
    r"^\w+ should have ": "",
    r"a valid dictionary or instance of \w+": "a group of settings",
    r"greater than or equal to": "at least",
    r"less than or equal to": "at most",
    r" after validation, not \d+": "",
}
# settings that an entry of warp.runs may change: those of a run's reward and update that change no shape
OF_A_RUN = re.compile(
    r"rewards\.[^.]+\.weight|seed|warp\.(ema_rate|anchor|anchor_every|bema\.\w+|stop_at_kl)|"
    r"rl\.(?!(batch_size|samples_per_prompt|num_microbatches)$)[\w.]+"
)
MEANT = "rewards.NAME.weight, seed, the anchor, warp.stop_at_kl, or rl without its sizes; runs share all others"


class Settings(groups.Group):
    """A whole config. Made by `from_config`; `as_json` gives the content of a workdir's config.json."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    checkpoint_every: groups.Count
    checkpoint_minutes: groups.Minutes = 10.0  # missing in older workdirs
    mesh: Annotated[tuple[int, ...], groups.Lax]
    data: groups.Data
    tokenizer: groups.Tokenizer | None = None  # only without model.source
    model: groups.Model
    adam: groups.Adam
    sft: groups.Sft
    reward_model: groups.RewardModel
    rewards: dict[str, groups.RewardPart]
    gold: groups.Gold
    sampling: groups.Sampling
    rl: groups.Rl
    warp: groups.Warp
    keep: groups.Keep = groups.Keep()  # missing in older workdirs
    front: groups.Front
    evaluation: groups.Evaluation
    health: groups.Health = groups.Health()  # missing in older workdirs
    logging: groups.Logging = groups.Logging()  # missing in older workdirs
    report: groups.Report

    @property
    def reward_parts(self) -> dict[str, groups.RewardPart]:
        """The parts of the reward with a weight other than 0."""
        return {name: part for name, part in self.rewards.items() if part.weight}

    @property
    def all_reward_parts(self) -> dict[str, groups.RewardPart]:
        """The parts with a weight other than 0, here or in an entry of warp.runs."""
        changed = {path for changes in self.warp.runs for path, value in changes.items() if value}
        return {name: part for name, part in self.rewards.items() if part.weight or f"rewards.{name}.weight" in changed}

    @property
    def needs_reward_model(self) -> bool:
        """True if a part of the reward, or of the reward of a run, is the model trained here."""
        used = self.all_reward_parts
        return any(part.source == "reward_model" and name in used for name, part in self.rewards.items())

    @property
    def response_fields(self) -> dict[str, tuple[str, ...]]:
        """Fields of the responses that SFT (one) and the reward model (chosen, rejected) learn from, by their name.

        Empty if they learn from whole texts, or are not trained.
        """
        data = self.data
        fields = {
            "sft": (data.response_field,) if self.sft.num_steps else (),
            "reward_model": (data.chosen_field, data.rejected_field) if self.needs_reward_model else (),
        }
        return {part: names for part, names in fields.items() if any(names)}

    @property
    def needs_labels(self) -> bool:
        """True if the reward model or the gold reward learns from the labels of the rows."""
        return (self.needs_reward_model and not self.data.chosen_field) or self.gold.source == "tfidf"

    @property
    def learns_from_texts(self) -> bool:
        """True if SFT, the reward model or the gold reward learns from whole texts, without prompts."""
        return (self.sft.num_steps > 0 and not self.data.response_field) or self.needs_labels

    @property
    def learned_splits(self) -> tuple[str, ...]:
        """Splits that SFT, the reward model and the gold reward are trained or measured on."""
        return ("reward", "gold", "eval") if self.learns_from_texts or self.response_fields else ()

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary trained here; 0 with a pretrained model, which has its own."""
        return self.tokenizer.vocab_size if self.tokenizer else 0

    @property
    def evaluation_temperature(self) -> float:
        """Temperature of the distributions that evaluations sample and compare."""
        return self.evaluation.temperature or self.sampling.temperature

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, from which `from_config` makes the same settings."""
        return self.model_dump(mode="json", exclude_none=True)

    def replace(self, changes: Mapping[str, Any]) -> "Settings":
        """The same settings with new values by path, such as {"rl.batch_size": 64}; validated like any config."""
        return _all_read(self._changed(changes))

    def _changed(self, changes: Mapping[str, Any]) -> "Settings":
        """The same as `replace`, but values may be unread: a run does not read each setting of the config."""
        tree = self.as_json()
        for path, value in changes.items():
            *parents, name = path.split(".")
            group = tree
            for depth, parent in enumerate(parents, 1):
                if not isinstance(group.get(parent), dict):
                    raise ValueError(f"config.{'.'.join(parents[:depth])}: no such setting; {_closest(parent, group)}")
                group = group[parent]
            group[name] = value
        return _validated(tree)

    @property
    def of_runs(self) -> tuple["Settings", ...]:
        """Settings of each run: these, with the changes of its entry in warp.runs."""
        if not self.warp.runs:
            return (self,) * self.warp.num_runs
        return tuple(self._changed({**changes, "warp.runs": ()}) for changes in self.warp.runs)

    @model_validator(mode="after")
    def _mesh_has_one_rest(self) -> "Settings":
        if len(self.mesh) != 3 or self.mesh.count(-1) > 1 or any(size < 1 and size != -1 for size in self.mesh):
            raise ValueError(f"mesh: got {self.mesh}, want three sizes of at least 1, of which one may be -1")
        return self

    @model_validator(mode="after")
    def _model_comes_from_one_place(self) -> "Settings":
        own = {"model.architecture": self.model.architecture, "tokenizer": self.tokenizer}
        unused = [f"config.{name}" for name, value in own.items() if value is not None]
        if self.model.source and unused:
            raise ValueError(
                f"model.source: got {self.model.source!r}, but {' and '.join(unused)} would be ignored; start from "
                "configs/pretrained.py, which has neither"
            )
        if not self.model.source and len(unused) < 2:
            raise ValueError("model.source: got '', want a model folder, hf://ORG/NAME, a .gguf file or package:NAME")
        if not self.model.source and not self.sft.num_steps:
            raise ValueError("sft.num_steps: got 0, want at least 1: without model.source, weights are random")
        if not self.model.source and self.data.chat:
            raise ValueError("data.chat: got True, want False: a tokenizer trained here has no chat template")
        if not self.model.source and self.sampling.stop_tokens:
            raise ValueError(
                f"sampling.stop_tokens: got {self.sampling.stop_tokens}, want (): they are tokens of a pretrained model"
            )
        return self

    @model_validator(mode="after")
    def _nothing_learns_from_chats(self) -> "Settings":
        if self.data.chat and self.learns_from_texts:
            raise ValueError(
                "data.chat: got True, want False, or sft.num_steps = 0 and no reward_model or tfidf: these learn from "
                "texts without the chat template, except SFT with data.response_field and reward_model with "
                "data.chosen_field"
            )
        return self

    @model_validator(mode="after")
    def _pairs_have_their_loss(self) -> "Settings":
        if "reward_model" in self.response_fields and self.reward_model.loss != "bradley_terry":
            raise ValueError(
                f"reward_model.loss: got {self.reward_model.loss!r}, want 'bradley_terry' for data.chosen_field: pairs "
                "have no labels"
            )
        return self

    @model_validator(mode="after")
    def _rewards_can_be_made(self) -> "Settings":
        if not self.reward_parts:
            raise ValueError("rewards: no part has a weight other than 0, want at least one")
        pattern = self.reward_model.trainable
        if self.needs_reward_model and not re.search(pattern, "score/kernel"):
            raise ValueError(
                f"reward_model.trainable: got {pattern!r}, want a pattern that also matches score/kernel: the head "
                "starts at 0, and would stay there"
            )
        if not self.data.label_field and self.needs_labels:
            raise ValueError("data.label_field: got '', want the field of the 0/1 labels that the rewards learn from")
        return self

    @model_validator(mode="after")
    def _kept_steps_are_made(self) -> "Settings":
        most = max(self.warp.steps_per_iteration)
        if self.keep.steps and self.keep.steps[-1] > most:
            raise ValueError(f"keep.steps: got {self.keep.steps}, want at most {most}, the steps of the longest run")
        return self

    @model_validator(mode="after")
    def _each_run_has_valid_settings(self) -> "Settings":
        for number, changes in enumerate(self.warp.runs):
            for path in changes:
                if not OF_A_RUN.fullmatch(path):
                    raise ValueError(f"warp.runs[{number}]: got {path!r}, want {MEANT}")
            try:
                self._changed({**changes, "warp.runs": ()})
            except ValueError as error:
                raise ValueError(f"warp.runs[{number}]: {str(error).removeprefix('config.')}") from error
        return self


def from_config(config: Mapping[str, Any]) -> Settings:
    """Validate a config, as plain nested mappings (`ConfigDict.to_dict()`, or the content of a config.json).

    Raises:
        ValueError: the first value that is missing, unknown, of a wrong type or out of range, does not fit others, or
            would be ignored; one line: its path, what was given and what is wanted.
    """
    return _all_read(_validated(config))


def from_saved(config: Mapping[str, Any]) -> Settings:
    """The settings in a workdir's config.json. Values that nothing reads may be in older ones; they become defaults.

    Raises ValueError as `from_config` does.
    """
    settings = _validated(config)
    return settings.replace(unread.without(_unread(settings), settings.warp.runs))


def _all_read(settings: Settings) -> Settings:
    """The settings. Raises ValueError if one of them is set and nothing reads it."""
    for found in _unread(settings):
        raise ValueError(f"config.{found.message()}")
    return settings


def _unread(settings: Settings) -> list[unread.Unread]:
    return list(unread.find(settings, settings.of_runs, settings.warp.runs))


def _validated(config: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(legacy.upgrade(config))
    except ValidationError as error:
        raise ValueError(_first_line(error)) from error


def check_devices(settings: Settings, devices: int) -> None:
    """Raise ValueError if a batch cannot be split over this number of devices (mesh data x fsdp)."""
    sizes = {
        "sft.batch_size": (
            settings.sft.batch_size,
            devices * settings.sft.num_microbatches,
            "mesh data x fsdp x sft.num_microbatches",
        ),
        "reward_model.batch_size": (settings.reward_model.batch_size, devices, "mesh data x fsdp"),
        "evaluation.batch_size": (settings.evaluation.batch_size, devices, "mesh data x fsdp"),
        "rl.batch_size": (
            settings.rl.batch_size,
            devices * settings.rl.num_microbatches,
            "mesh data x fsdp x rl.num_microbatches",
        ),
    }
    for path, (size, factor, meaning) in sizes.items():
        if size % factor:
            raise ValueError(f"config.{path}: got {size}, want a multiple of {factor} = {meaning}")


def _first_line(error: ValidationError) -> str:
    """Write one of pydantic's errors in one line: an unknown name first, since it explains a missing one."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    path = ".".join(str(part) for part in ("config", *first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{path}: no such setting; {_suggestion(first['loc'])}"
    if first["type"] == "missing":
        return f"{path}: missing; start from configs/default.py, which has every setting"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{path}: {message}" if message.startswith("got") else f"{path}.{message}"
    wanted = first["msg"]
    for theirs, ours in PLAIN.items():
        wanted = re.sub(theirs, ours, wanted)
    return f"{path}: got {repr(first['input'])[:100]}, want {wanted}"


def _suggestion(place: tuple[int | str, ...]) -> str:
    group: Any = Settings
    for part in place[:-1]:
        kinds = [group.model_fields[part].annotation] if part in getattr(group, "model_fields", {}) else []
        nested = [k for kind in kinds for k in (kind, *getattr(kind, "__args__", ())) if hasattr(k, "model_fields")]
        group = nested[0] if nested else groups.RewardPart
    return _closest(str(place[-1]), group.model_fields)


def _closest(name: str, known: Iterable[str]) -> str:
    """Suggest the known names that are like an unknown one."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {', '.join(close)}?" if close else f"want one of {', '.join(names)}"
