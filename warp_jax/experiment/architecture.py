"""From the config to its models: settings of the policy and of the reward model, and the files they come from."""

import dataclasses
import re
from pathlib import Path

from ml_collections import ConfigDict

from warp_jax import files
from warp_jax.models import freezing, presets, rope
from warp_jax.models.apply import param_shapes
from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained import sources

FINGERPRINTS = "models.json"  # in a workdir


def policy_config(config: ConfigDict, tokenizer_size: int) -> TransformerConfig:
    """Settings of the model at `source`, or those of `architecture`; its stacks are cut for `trainable`.

    ValueError if a setting is wrong, or no weight is trainable.
    """
    if config.source:
        settings = sources.read_settings(sources.find(config.source), "language", config.dtype)
    else:
        values = config.architecture.to_dict()
        scaling = rope.RopeScaling(**values.pop("rope_scaling"))
        pattern = tuple(values.pop("local_pattern"))
        settings = TransformerConfig(
            vocab_size=tokenizer_size, rope_scaling=scaling, local_pattern=pattern, dtype=config.dtype, **values
        )
    presets.check_size(settings, config.size)
    return _as_configured(settings, config)


def planned(config: ConfigDict) -> tuple[TransformerConfig, TransformerConfig | None]:
    """Settings of the policy and of the reward model (None without one), whether or not their files are there.

    A policy whose folder is missing has the published size `model.size`; such a reward model the policy's.
    """
    if config.model.source and config.model.size and not Path(config.model.source).exists():
        presets.check_name(config.model.size)
        policy = _as_configured(presets.MODELS[config.model.size], config.model)
    else:
        policy = policy_config(config.model, 0 if config.model.source else config.tokenizer.vocab_size)
    names = [part.source for part in config.rewards.values() if part.weight]
    if "reward_model" in names:
        return policy, reward_model_config(config.reward_model, policy)
    folders = [source for source in names if ":" not in source and source != "length"]
    if not folders:
        return policy, None
    if Path(folders[0]).is_dir():
        return policy, sources.read_settings(Path(folders[0]), "scalar", config.model.dtype)
    return policy, dataclasses.replace(policy, head="scalar", tied_head=False, layer_groups=())


def reward_model_config(config: ConfigDict, policy: TransformerConfig) -> TransformerConfig:
    """Settings of the reward model: the policy's first num_layers layers (0 = all), with a scalar head."""
    if config.num_layers > policy.num_layers:
        raise ValueError(
            f"config.reward_model.num_layers: got {config.num_layers}, want at most the policy's {policy.num_layers}"
        )
    if not re.search(config.trainable, "score/kernel"):
        raise ValueError(
            f"config.reward_model.trainable: got {config.trainable!r}, want a pattern that matches score/kernel too: "
            "the head starts at 0, and would stay there"
        )
    layers = config.num_layers or policy.num_layers
    settings = dataclasses.replace(policy, num_layers=layers, head="scalar", layer_groups=(), tied_head=False)
    return _cut_stacks(settings, config.trainable)


def fingerprints(config: ConfigDict) -> dict[str, str]:
    """Of the folder of every model from outside that a config names, by its name there."""
    parts = [part.source for part in config.rewards.values() if part.weight]
    folders = {source: Path(source) for source in (*parts, config.gold.source) if source and Path(source).is_dir()}
    if config.model.source:
        folders[config.model.source] = sources.find(config.model.source)
    return {source: files.fingerprint(folder) for source, folder in folders.items()}


def check_unchanged(config: ConfigDict, workdir: Path) -> dict[str, str]:
    """The fingerprints of today; ValueError if a model's files are others than when the workdir was made."""
    found, path = fingerprints(config), workdir / FINGERPRINTS
    before = files.read_json(path) if path.exists() else {}
    for source, fingerprint in found.items():
        if before.get(source, fingerprint) != fingerprint:
            raise ValueError(
                f"workdir {workdir} was made with other files of {source}, whose task vectors it holds; "
                "bring them back, or choose another --workdir"
            )
    return found


def _as_configured(settings: TransformerConfig, config: ConfigDict) -> TransformerConfig:
    """The policy with what config.model says of how it is computed and trained."""
    return _cut_stacks(dataclasses.replace(settings, dtype=config.dtype, remat=config.remat), config.trainable)


def _cut_stacks(settings: TransformerConfig, trainable: str) -> TransformerConfig:
    """The same model with a stack of layers for each group that is trained or frozen together."""
    return dataclasses.replace(settings, layer_groups=freezing.layer_groups(trainable, param_shapes(settings)))
