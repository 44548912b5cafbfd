"""The compiled programs of Algorithm 1. A job runs them; `tpu_fit` compiles the same ones for a TPU slice."""

import functools
from typing import NamedTuple

from jax.sharding import Mesh

from warp_jax import trees
from warp_jax.evaluation import measure
from warp_jax.models.apply import make_apply_fn
from warp_jax.models.transformer import TransformerConfig, init_cache
from warp_jax.settings import Settings
from warp_jax.training import loop, optimizers, reinforce, sampling, scoring
from warp_jax.types import Params, TrainState


class Programs(NamedTuple):
    """sampler: generation, in training and evaluation. train: a step of RL. kl_to_sft: the KL of an evaluation."""

    sampler: sampling.Sampler
    train: loop.Programs[TrainState]
    kl_to_sft: measure.KlFn


def make_programs(
    settings: Settings,
    mesh: Mesh,
    model: TransformerConfig,
    *,
    trained: Params,
    frozen: Params,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Programs:
    """Jit the programs for a policy `model`, whose trained and frozen leaves are shaped like these trees."""
    apply_fn = make_apply_fn(model, mesh)
    temperature, chunk = settings.sampling.temperature, settings.model.logits_chunk
    update = reinforce.make_programs(
        mesh,
        trained,
        optimizer=optimizers.make_optimizer(settings.rl, settings.adam),
        score_fn=functools.partial(scoring.per_token_logps, apply_fn, temperature=temperature, chunk=chunk),
        rl=settings.rl,
        ema_rate=settings.warp.ema_rate,
    )
    sampler = sampling.make_sampler(
        mesh,
        trees.join(trained, frozen),
        apply_fn=apply_fn,
        make_cache=functools.partial(init_cache, model, mesh=mesh),
        dtype=model.dtype,
        config=sampling.SamplingConfig(settings.sampling.max_new_tokens, temperature, stop_ids, pad_id),
    )
    score_kl = functools.partial(scoring.sequence_kl, apply_fn, temperature=temperature, chunk=chunk)
    return Programs(sampler, update, measure.make_kl_to_sft(score_kl))
