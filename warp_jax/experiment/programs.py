"""The compiled programs of Algorithm 1, made from a config: those that run are those that are compiled for a pod."""

import functools
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from warp_jax import trees
from warp_jax.evaluation import measure
from warp_jax.experiment import ingredients
from warp_jax.models.apply import make_apply_fn
from warp_jax.models.transformer import TransformerConfig, init_cache
from warp_jax.training import reinforce, sampling
from warp_jax.types import Params


class Programs(NamedTuple):
    """Sampler: generation, in training and in evaluation; train: a step of RL; kl_to_sft: of an evaluation."""

    sampler: sampling.Sampler
    train: reinforce.Programs
    kl_to_sft: measure.KlFn


def make_programs(
    config: ConfigDict,
    mesh: Mesh,
    model: TransformerConfig,
    *,
    sampling_config: sampling.SamplingConfig,
    trained: Params,
    frozen: Params,
) -> Programs:
    """For the policy `model`, whose trained and frozen weights are shaped like these trees (arrays or shapes)."""
    apply_fn = make_apply_fn(model, mesh)
    temperature, chunk = sampling_config.temperature, config.model.logits_chunk
    update = reinforce.make_programs(
        mesh,
        trained,
        apply_fn=apply_fn,
        optimizer=ingredients.make_optimizer(config.rl, config.adam),
        temperature=temperature,
        kl_coef=config.rl.kl_coef,
        ema_rate=config.warp.ema_rate,
        advantage=config.rl.advantage,
        group_size=config.rl.samples_per_prompt,
        whiten=config.rl.whiten,
        num_microbatches=config.rl.num_microbatches,
        logits_chunk=chunk,
    )
    sampler = sampling.make_sampler(
        mesh,
        trees.join(trained, frozen),
        apply_fn=apply_fn,
        make_cache=functools.partial(init_cache, model, mesh=mesh),
        dtype=model.dtype,
        config=sampling_config,
    )
    return Programs(sampler, update, measure.make_kl_to_sft(apply_fn, temperature, chunk))
