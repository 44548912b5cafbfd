"""Bad input, found before anything is written. Every message says what, got, wanted and what to do."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from warp_jax import files, merging
from warp_jax.data import corpus
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture, preparation
from warp_jax.models import apply, partitioning
from warp_jax.models.transformer import REMAT
from warp_jax.parallel import hosts, meshes
from warp_jax.pretrained import hf_weights, sources
from warp_jax.rewards import reward_functions
from warp_jax.training import objective, supervised

FREE = ("report.", "front.", "mesh ")  # what may change between two starts; another mesh changes rounding only
CONFIG = "config.json"  # in a workdir: of the job that it belongs to
LOCK = "lock"  # in a workdir: held while it is claimed, and while what all runs share is made

Check = tuple[str, Callable[[Any], bool], str]


def _one_of(*options: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in options, "one of " + ", ".join(options)


_POSITIVE = (lambda v: v >= 1, "a whole number of at least 1")
_NOT_NEGATIVE = (lambda v: v >= 0, "at least 0")
_ABOVE_ZERO = (lambda v: v > 0, "more than 0")
_RATE = (lambda v: 0 <= v <= 1, "between 0 and 1")

CHECKS: tuple[Check, ...] = tuple(
    (path, *check)
    for paths, check in (
        (("warp.num_iterations", "warp.num_runs", "checkpoint_every", "evaluation.every"), _POSITIVE),
        (
            ("sft.batch_size", "rl.batch_size", "rl.samples_per_prompt", "rl.num_microbatches"),
            _POSITIVE,
        ),
        (("sft.num_steps", "reward_model.num_layers", "model.logits_chunk"), _NOT_NEGATIVE),
        (("reward_model.num_steps", "evaluation.num_prompts", "evaluation.batch_size"), _POSITIVE),
        (("sampling.max_new_tokens", "gold.max_terms", "gold.fragments_per_text", "report.num_samples"), _POSITIVE),
        (("report.bootstrap_resamples",), _POSITIVE),
        (
            ("sampling.prompt_tokens", "sft.sequence_tokens", "reward_model.sequence_tokens"),
            (lambda v: v >= 2, "at least 2"),
        ),
        (
            ("reward_model.batch_size",),
            (lambda v: v >= 2 and v % 2 == 0, "an even number: half of a batch has label 1"),
        ),
        (("warp.ema_rate", "warp.liti_rate"), _RATE),
        (("adam.b1", "adam.b2"), (lambda v: 0 <= v < 1, "at least 0 and less than 1")),
        (("front.etas",), (lambda v: len(v) > 0 and min(v) >= 0, "at least one eta, none below 0")),
        (("rl.kl_coef", "front.kl_budget", "seed"), _NOT_NEGATIVE),
        (("sft.clip_norm", "rl.clip_norm", "reward_model.clip_norm"), _NOT_NEGATIVE),
        (("sft.warmup_steps", "rl.warmup_steps", "reward_model.warmup_steps"), _NOT_NEGATIVE),
        (("sft.learning_rate", "rl.learning_rate", "reward_model.learning_rate", "adam.eps"), _ABOVE_ZERO),
        (("sampling.temperature",), _ABOVE_ZERO),
        (
            ("data.reward_fraction", "data.gold_fraction", "data.prompts_fraction"),
            (lambda v: 0 < v < 1, "between 0 and 1"),
        ),
        (("warp.merge",), _one_of(*merging.METHODS)),
        (("warp.unit",), _one_of("layer", "tensor", "model")),
        (("rl.advantage",), _one_of(*objective.ADVANTAGES)),
        (("reward_model.loss",), _one_of(*supervised.REWARD_LOSSES)),
        (("model.dtype",), _one_of("float32", "bfloat16")),
        (("model.remat",), _one_of(*REMAT)),
    )
    for path in paths
)


SIZES = ("width", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "head_dim")
FROM_SCRATCH: tuple[Check, ...] = (  # with an empty model.source
    *((f"model.architecture.{name}", *_POSITIVE) for name in SIZES),
    ("tokenizer.vocab_size", lambda v: v >= 259, "at least 259: 256 bytes and 3 special tokens"),
    ("sft.num_steps", *_POSITIVE),
)


def check_config(config: ConfigDict) -> None:
    """Raise ValueError at the first value that cannot work."""
    _check_source_or_architecture(config)
    mesh = meshes.make_mesh(config.mesh)
    check_values(config, mesh)
    corpus.check_source(config.data.source)
    _check_rewards(config)
    if not config.data.label_field and preparation.needs_labels(config):
        raise ValueError(
            "config.data.label_field: got '', want the field of the 0/1 labels that the rewards learn from"
        )
    _check_models(config, mesh)


def check_values(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError at the first value that is out of range or does not fit others or the mesh; reads no file."""
    for path, is_good, want in (*CHECKS, *(() if config.model.source else FROM_SCRATCH)):
        value = _leaf(config, path)
        if not is_good(value):
            raise ValueError(f"config.{path}: got {value!r}, want {want}")
    _check_together(config, meshes.batch_devices(mesh))


def _check_source_or_architecture(config: ConfigDict) -> None:
    unused = [f"config.{name}" for name in ("model.architecture", "tokenizer") if _has(config, name)]
    if config.model.source and unused:
        raise ValueError(
            f"config.model.source: got {config.model.source!r}, but {' and '.join(unused)} would be ignored; "
            "start from configs/pretrained.py, which has neither"
        )
    if not config.model.source and len(unused) < 2:
        raise ValueError("config.model.source: got '', want a model folder, a .gguf file or package:NAME")


def _check_models(config: ConfigDict, mesh: Mesh) -> None:
    """Read the files of all models, and lay their parameters out, without the values of their weights."""
    vocab_size = 0 if config.model.source else config.tokenizer.vocab_size
    policy = architecture.policy_config(config.model, vocab_size)
    models = [policy]
    if preparation.needs_reward_model(config):
        models.append(architecture.reward_model_config(config.reward_model, policy))
    shapes = [apply.param_shapes(model) for model in models]
    for tree in shapes:
        partitioning.param_shardings(mesh, tree)
    if config.model.source:
        hf_weights.check_weights(sources.find(config.model.source), policy, shapes[0])


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
    """Write config.json, once the workdir is found to be free or of the same config but for FREE.

    Jobs of one workdir may start together.
    """

    def tell() -> None:
        print(f"another process prepares {workdir}: waiting for it", file=sys.stderr)

    def claim() -> None:
        _check_workdir(config, workdir)  # before the lock, which is a file in there
        with files.locked(workdir / LOCK, tell):
            _check_workdir(config, workdir)
            fingerprints = architecture.check_unchanged(config, workdir)
            files.write_json(workdir / CONFIG, json.loads(config.to_json()))
            if fingerprints:
                files.write_json(workdir / architecture.FINGERPRINTS, fingerprints)

    try:
        hosts.on_first_process(claim)
    except OSError as error:
        raise ValueError(f"workdir: cannot write to {workdir}: {error.strerror}; choose another --workdir") from error


def _check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Raise ValueError if the workdir is another job's, or no folder for one."""
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir: {workdir} is a file, want a folder")
    found = {path.name for path in workdir.iterdir()} if workdir.exists() else set()  # once: others may write there
    if CONFIG in found:
        mine = json.loads(config.to_json())
        changed = sorted(_differences(files.read_json(workdir / CONFIG), mine))
        kept = [line for line in changed if not line.startswith(FREE)]
        if kept:
            raise ValueError(
                f"workdir {workdir} was made by another config: {'; '.join(kept)}; choose another --workdir"
            )
    elif any(name != LOCK and not name.startswith(".") for name in found):
        raise ValueError(f"workdir: {workdir} holds other files and no config.json, want a new or empty folder")


def _check_rewards(config: ConfigDict) -> None:
    for name, part in config.rewards.items():
        if set(part) != {"source", "weight"}:
            raise ValueError(f"config.rewards.{name}: got {sorted(part)}, want source and weight")
    used = {name: part.source for name, part in config.rewards.items() if part.weight}
    if not used:
        raise ValueError("config.rewards: no part has a weight other than 0, want at least one")
    for name, source in used.items():
        _check_reward_source(f"rewards.{name}.source", source, ("reward_model", "length"), config.data.chat)
    _check_reward_source("gold.source", config.gold.source, ("tfidf", ""), config.data.chat)


def _check_reward_source(path: str, source: str, names: tuple[str, ...], use_chat: bool) -> None:
    """A reward's source is one of the names, the folder of a reward model, or a function that can be loaded."""
    if source in names:
        return
    try:
        if Path(source).is_dir():
            settings = sources.read_settings(Path(source), "scalar", "float32")
            hf_weights.check_weights(Path(source), settings, apply.param_shapes(settings))
            if use_chat and Tokenizer.from_folder(Path(source)).chat_template is None:
                raise ValueError("it has no chat template, and config.data.chat asks it to read conversations")
        else:
            reward_functions.load_function(source)
    except ValueError as error:
        want = ", ".join(map(repr, names))
        raise ValueError(
            f"config.{path}: got {source!r}, want {want}, a reward model's folder or 'package.module:function': {error}"
        ) from error


def _check_together(config: ConfigDict, devices: int) -> None:
    """Values that must fit each other; devices: how many a batch is split over."""
    for path in ("sft.batch_size", "reward_model.batch_size", "evaluation.batch_size"):
        _check_multiple(config, path, devices, "the devices that split a batch (mesh data x fsdp)")
    _check_multiple(
        config, "rl.batch_size", devices * config.rl.num_microbatches, "mesh data x fsdp x num_microbatches"
    )
    _check_multiple(config, "rl.batch_size", config.rl.samples_per_prompt, "rl.samples_per_prompt")
    _check_multiple(config, "evaluation.num_prompts", config.evaluation.batch_size, "evaluation.batch_size")
    if config.rl.advantage == "leave_one_out" and config.rl.samples_per_prompt < 2:
        raise ValueError("config.rl.samples_per_prompt: got 1, want at least 2 for advantage leave_one_out")
    if config.warp.merge == "model_stock" and config.warp.num_runs < 2:
        raise ValueError("config.warp.num_runs: got 1, want at least 2 for warp.merge model_stock")
    if len(config.warp.steps_per_iteration) != config.warp.num_iterations or min(config.warp.steps_per_iteration) < 1:
        raise ValueError(
            f"config.warp.steps_per_iteration: got {tuple(config.warp.steps_per_iteration)}, want "
            f"warp.num_iterations = {config.warp.num_iterations} numbers, each at least 1"
        )
    fractions = config.data.reward_fraction + config.data.gold_fraction + config.data.prompts_fraction
    if fractions >= 1:
        raise ValueError(
            f"config.data: the fractions add to {fractions:g}, want less than 1: the rest is for evaluation"
        )


def _check_multiple(config: ConfigDict, path: str, factor: int, of: str) -> None:
    if _leaf(config, path) % factor:
        raise ValueError(f"config.{path}: got {_leaf(config, path)}, want a multiple of {factor}, {of}")


def _has(config: ConfigDict, path: str) -> bool:
    group, _, name = path.rpartition(".")
    return name in (config[group] if group else config)


def _leaf(config: ConfigDict, path: str) -> Any:
    for key in path.split("."):
        config = config[key]
    return config


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {before!r}, now {after!r}"
