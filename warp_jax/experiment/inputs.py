"""Checks of everything that a config names, made before anything is written: data, rewards, models and the mesh."""

from pathlib import Path

from warp_jax.data import corpus
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture
from warp_jax.models import partitioning
from warp_jax.models.apply import param_shapes
from warp_jax.parallel import meshes
from warp_jax.pretrained import hf_weights, sources
from warp_jax.rewards import reward_functions
from warp_jax.settings import Settings, check_devices


def check(settings: Settings) -> None:
    """Raise ValueError at the first file, function, model or mesh that cannot be used."""
    mesh = meshes.make_mesh(settings.mesh)
    check_devices(settings, meshes.batch_devices(mesh))
    corpus.check_source(settings.data.source, settings.data.task)
    for name, part in settings.reward_parts.items():
        _check_reward(f"rewards.{name}.source", part.source, ("reward_model", "length"), settings.data.chat)
    _check_reward("gold.source", settings.gold.source, ("tfidf", ""), settings.data.chat)
    policy = architecture.policy_config(settings.model, settings.vocab_size)
    shapes = [param_shapes(policy)]
    if settings.needs_reward_model:
        shapes.append(param_shapes(architecture.reward_model_config(settings.reward_model, policy)))
    for tree in shapes:
        partitioning.param_shardings(mesh, tree)
    if settings.model.source:
        hf_weights.check_weights(sources.find(settings.model.source), policy, shapes[0])


def _check_reward(path: str, source: str, names: tuple[str, ...], use_chat: bool) -> None:
    """Raise ValueError unless the source is in `names`, a reward model's folder, or a function that can be loaded."""
    if source in names:
        return
    try:
        if Path(source).is_dir():
            model = sources.read_settings(Path(source), "scalar", "float32")
            hf_weights.check_weights(Path(source), model, param_shapes(model))
            if use_chat and Tokenizer.from_folder(Path(source)).chat_template is None:
                raise ValueError("it has no chat template, but with config.data.chat it must read conversations")
        else:
            reward_functions.load_function(source)
    except ValueError as error:
        want = ", ".join(map(repr, names))
        raise ValueError(
            f"config.{path}: got {source!r}, want {want}, a reward model's folder or 'package.module:function': {error}"
        ) from error
