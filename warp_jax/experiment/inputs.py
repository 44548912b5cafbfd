"""Checks of everything that a config names, made before anything is written: data, rewards, models and the mesh."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from warp_jax.data import corpus, fields, row_files
from warp_jax.data.corpus import Corpus
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture, preparation
from warp_jax.files import hub
from warp_jax.models import partitioning
from warp_jax.models.apply import param_shapes
from warp_jax.parallel import hosts, meshes
from warp_jax.pretrained import hf_weights, sources
from warp_jax.rewards import reward_functions, text_reward
from warp_jax.settings import Settings, check_devices
from warp_jax.settings.groups import Gold, RewardPart
from warp_jax.training import wandb_run
from warp_jax.types import RewardError

REWARDS, GOLDS = ("reward_model", "length"), ("tfidf", "")  # sources that are neither folders nor functions
COMPLETIONS = ("", " The answer is 1.", " Yes.\n\nNo, 1/2 \u00fc \\boxed{3}")  # a fourth one comes from the data


def check(settings: Settings) -> None:
    """Raise ValueError at the first file, function, model or mesh that cannot be used."""
    mesh = meshes.make_mesh(settings.mesh)
    check_devices(settings, meshes.batch_devices(mesh))
    if hosts.is_first():
        wandb_run.check(settings)
    corpus.check_source(settings.data.source, settings.data.task, settings.data.split)
    _check_text(settings.evaluation.text)
    for name, part in settings.all_reward_parts.items():
        _check_reward(f"rewards.{name}.source", part, REWARDS, settings.data.chat)
    _check_reward("gold.source", settings.gold, GOLDS, settings.data.chat)
    policy = architecture.policy_config(settings.model, settings.vocab_size)
    shapes = [param_shapes(policy)]
    if settings.needs_reward_model:
        shapes.append(param_shapes(architecture.reward_model_config(settings.reward_model, policy)))
    for tree in shapes:
        partitioning.param_shardings(mesh, tree)
    partitioning.decode_shardings(meshes.regroup(mesh, settings.sampling.tensor), shapes[0])
    if settings.model.source:
        hf_weights.check_weights(sources.find(settings.model.source), policy, shapes[0])


def pin(settings: Settings) -> Settings:
    """The same settings with the commit of every source on the Hugging Face Hub: nothing changes if a branch moves.

    Process 0 asks the Hub, so that all processes have the same commits. Raises ValueError that names the setting, if
    there is no such repository or revision; HubError if the Hub fails.
    """
    changes = json.loads(hosts.text_of_first(lambda: json.dumps(_pinned(settings))))
    return hosts.all_or_none(lambda: settings.replace(changes)) if changes else settings


def _pinned(settings: Settings) -> dict[str, str]:
    """The sources on the Hub with their commits, by the path of their setting."""
    found: dict[str, tuple[str, hub.Kind]] = {
        "model.source": (settings.model.source, "model"),
        "gold.source": (settings.gold.source, "model"),
        "data.source": (settings.data.source, "dataset"),
        "evaluation.text": (settings.evaluation.text, "dataset"),
        **{f"rewards.{name}.source": (part.source, "model") for name, part in settings.rewards.items()},
    }
    pinned = {}
    for path, (source, kind) in found.items():
        if source.startswith(hub.PREFIX):
            with fields.at(f"config.{path}"):
                pinned[path] = hub.pin(source, kind)
    return pinned


def try_rewards(settings: Settings, corpora: Mapping[str, Corpus]) -> None:
    """Call each Python function of the rewards on a few rows of its splits, with short completions, one of them empty.

    Only process 0 calls them. Raises RewardError if a function fails.
    """
    parts = [(f"rewards.{name}", part.source, part.timeout) for name, part in settings.all_reward_parts.items()]
    for group, source, timeout in [*parts, ("gold", settings.gold.source, settings.gold.timeout)]:
        if source in REWARDS + GOLDS or sources.is_folder(source) or not hosts.is_first():
            continue
        function = text_reward.load_function(source, f"config.{group}.source", timeout)
        for split in ("eval",) if group == "gold" else ("prompts", "eval"):
            numbers = [number % len(corpora[split].rows) for number in range(len(COMPLETIONS) + 1)]
            few = Corpus._make([column[number] for number in numbers] for column in corpora[split])
            with reward_functions.naming_row(numbers, split):
                function.local(*_samples(settings, few), few.rows)


def _samples(settings: Settings, few: Corpus) -> tuple[list[str], list[str]]:
    """Prompts of rows, almost as a reward function will see them, and short completions."""
    data, sampling = settings.data, settings.sampling
    start, end = 4 * sampling.prompt_tokens, 4 * (sampling.prompt_tokens + sampling.max_new_tokens)  # characters
    completions = [*COMPLETIONS, few.texts[-1][start:end]]
    if not data.prompt_template and not data.chat:
        return [text[:start] for text in few.texts], completions
    prompts = preparation.prompt_values(settings, few)
    if data.chat:
        tokenizer = preparation.read_tokenizer(settings)
        ids = preparation.encode_chats(tokenizer, prompts, few.places)
        prompts = [tokenizer.decode(row[None], np.ones((1, len(row)), bool))[0] for row in ids]
    return prompts, completions


def _check_text(source: str) -> None:
    """Raise ValueError unless the source is a file of rows, here or on the Hub, or empty."""
    is_file = row_files.is_supported(Path(source)) and (source.startswith(hub.PREFIX) or Path(source).is_file())
    if source and not is_file:
        raise ValueError(
            f"config.evaluation.text: got {source!r}, want '' or a .jsonl, .json, .csv or .parquet file (or .gz of "
            "it), also hf://ORG/NAME/FILE"
        )


def _check_reward(path: str, part: RewardPart | Gold, names: tuple[str, ...], use_chat: bool) -> None:
    """Raise ValueError unless the source is in `names`, a reward model's folder, or a function that can be loaded."""
    source = part.source
    if source in names:
        return
    try:
        if sources.is_folder(source):
            folder = sources.find(source)
            model = sources.read_settings(folder, "scalar", "float32")
            hf_weights.check_weights(folder, model, param_shapes(model))
            if use_chat and Tokenizer.from_folder(folder).chat_template is None:
                raise ValueError("it has no chat template, but with config.data.chat it must read conversations")
        else:
            text_reward.load_function(source, timeout=part.timeout)
    except ValueError as error:
        want = ", ".join(map(repr, names))
        raise RewardError(
            f"config.{path}: got {source!r}, want {want}, a reward model's folder, hf://ORG/NAME or "
            f"'package.module:function': {error}{hub.did_you_mean(source)}"
        ) from error
