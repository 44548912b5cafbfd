"""Architecture of the policy and of the reward model, and the weights where SFT starts, from the settings."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from warp_jax.models import apply, freezing, partitioning, presets, rope
from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained import hf_weights, sources
from warp_jax.settings import Settings
from warp_jax.settings.groups import Model, RewardModel
from warp_jax.types import Params


def policy_config(model: Model, tokenizer_size: int) -> TransformerConfig:
    """Architecture of the model at `source`, or else `architecture`; layers are cut into stacks for `trained`.

    Raises:
        ValueError: a value is wrong, or no weight is trainable.
    """
    if model.architecture is None:
        policy = sources.read_settings(sources.find(model.source), "language", model.dtype)
    else:
        values = model.architecture.model_dump()
        scaling = rope.RopeScaling(**values.pop("rope_scaling"))
        policy = TransformerConfig(vocab_size=tokenizer_size, rope_scaling=scaling, dtype=model.dtype, **values)
    presets.check_size(policy, model.size)
    return _as_configured(policy, model)


def planned(settings: Settings) -> tuple[TransformerConfig, TransformerConfig | None]:
    """Architecture of the policy and of the reward model (None without one), even if their files are missing.

    A policy whose folder is missing has the published size `model.size`; a reward model whose folder is missing has
    the policy's.
    """
    model = settings.model
    if model.source and model.size and not Path(model.source).exists():
        presets.check_name(model.size)
        policy = _as_configured(presets.MODELS[model.size], model)
    else:
        policy = policy_config(model, settings.vocab_size)
    if settings.needs_reward_model:
        return policy, reward_model_config(settings.reward_model, policy)
    names = [part.source for part in settings.all_reward_parts.values()]
    folders = [name for name in names if sources.is_folder(name) or (":" not in name and name != "length")]
    if not folders:
        return policy, None
    if sources.is_folder(folders[0]):
        return policy, sources.read_settings(sources.find(folders[0]), "scalar", model.dtype)
    return policy, dataclasses.replace(policy, head="scalar", tied_head=False, layer_groups=())


def reward_model_config(settings: RewardModel, policy: TransformerConfig) -> TransformerConfig:
    """Architecture of the reward model: the policy's first num_layers layers (0 = all), with a scalar head."""
    if settings.num_layers > policy.num_layers:
        raise ValueError(
            f"config.reward_model.num_layers: got {settings.num_layers}, want at most the policy's {policy.num_layers}"
        )
    layers = settings.num_layers or policy.num_layers
    model = dataclasses.replace(policy, num_layers=layers, head="scalar", layer_groups=(), tied_head=False)
    return _cut_stacks(model, settings.trainable)


def start_params(settings: Settings, policy: TransformerConfig, mesh: Mesh) -> Params:
    """All weights where SFT starts: those of the pretrained model, or random ones without one."""
    if not settings.model.source:
        return apply.random_params(policy, mesh, settings.seed)
    like = partitioning.with_shardings(mesh, apply.param_shapes(policy))
    return hf_weights.load_params(sources.find(settings.model.source), policy, like)


def _as_configured(policy: TransformerConfig, model: Model) -> TransformerConfig:
    return _cut_stacks(dataclasses.replace(policy, dtype=model.dtype, remat=model.remat), *model.trained)


def _cut_stacks(model: TransformerConfig, *patterns: str) -> TransformerConfig:
    """The same model with a stack for each group of layers that is trained or frozen together."""
    return dataclasses.replace(model, layer_groups=freezing.layer_groups(apply.param_shapes(model), *patterns))
