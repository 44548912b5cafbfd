"""The compiled programs of Algorithm 1. A job runs them; `tpu_fit` compiles the same ones for a TPU slice."""

import dataclasses
import functools
from typing import NamedTuple

from jax.sharding import Mesh

from warp_jax import trees
from warp_jax.evaluation import measure
from warp_jax.generation import sampling
from warp_jax.models import freezing
from warp_jax.models.apply import make_apply_fn
from warp_jax.models.transformer import TransformerConfig, init_cache
from warp_jax.parallel import meshes
from warp_jax.settings import Settings
from warp_jax.settings.groups import Rl, Warp
from warp_jax.training import anchors, loop, optimizers, reinforce, scoring
from warp_jax.types import Params, TrainState


class Programs(NamedTuple):
    """Programs of training and of evaluation, which computes in `evaluation.dtype`."""

    sampler: sampling.Sampler
    train: tuple[loop.Programs[TrainState], ...]  # a step of RL, for each run; runs of equal settings share one
    evaluation_sampler: sampling.Sampler  # the same as `sampler` if dtypes and distributions are equal
    kl_to_sft: measure.KlFn
    text_losses: measure.TextFn


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
    """Jit the programs for a policy `model`. trained, frozen: its leaves, or their shapes."""
    given, chunk = settings.sampling, settings.model.logits_chunk
    trunk_layers = freezing.trunk_layers(trained, model.stacks)
    ids = stop_ids, pad_id
    drawn = sampling.SamplingConfig(given.max_new_tokens, given.temperature, *ids, given.top_k, given.top_p)
    evaluated = drawn._replace(temperature=settings.evaluation_temperature, top_k=0, top_p=1.0)
    sampling_mesh = meshes.regroup(mesh, settings.sampling.tensor)

    def make_sampler(model: TransformerConfig, config: sampling.SamplingConfig) -> sampling.Sampler:
        return sampling.make_sampler(
            mesh,
            trees.join(trained, frozen),
            apply_fn=make_apply_fn(model, sampling_mesh),
            make_cache=functools.partial(init_cache, model, mesh=sampling_mesh),
            dtype=model.dtype,
            config=config,
            trunk_layers=trunk_layers,
            sampling_mesh=sampling_mesh,
        )

    @functools.cache
    def make_update(rl: Rl, warp: Warp) -> loop.Programs[TrainState]:
        copies, score = reinforce.shared_samples(rl, mesh, rl.num_microbatches), scoring.per_token_logps
        rule = reinforce.Rule(
            score_fn=functools.partial(
                score, make_apply_fn(model, mesh), temperature=drawn.temperature, chunk=chunk, copies=copies
            ),
            optimizer=optimizers.make_optimizer(rl, settings.adam),
            rl=rl,
            lora=settings.model.lora,
            anchor=anchors.make_anchor(warp),
            stop_ids=stop_ids,
        )
        return reinforce.make_programs(mesh, trained, rule)

    sampler = make_sampler(model, drawn)
    measured = dataclasses.replace(model, dtype=settings.evaluation.dtype)
    apply_fn = make_apply_fn(measured, mesh)
    score_kl = functools.partial(
        scoring.sequence_kl, apply_fn, trunk_layers=trunk_layers, temperature=evaluated.temperature, chunk=chunk
    )
    return Programs(
        sampler=sampler,
        train=tuple(make_update(run.rl, run.warp) for run in settings.of_runs),
        evaluation_sampler=sampler if (measured, evaluated) == (model, drawn) else make_sampler(measured, evaluated),
        kl_to_sft=measure.make_kl_to_sft(score_kl),
        text_losses=measure.make_text_losses(functools.partial(scoring.next_token_losses, apply_fn, chunk=chunk)),
    )
