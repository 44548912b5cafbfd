"""Stages of training in warp_jax, from PYTHONPATH: so scripts/benchmark.py can measure another checkout too.

Weights are random, and no completion ends early: every library computes the same number of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from protocol import EMA_RATE, KL_COEF, LEARNING_RATE, Work, serve

from warp_jax import trees
from warp_jax.evaluation import measure
from warp_jax.models import apply, freezing, transformer
from warp_jax.parallel import meshes
from warp_jax.settings.groups import Rl
from warp_jax.training import reinforce, sampling, scoring
from warp_jax.types import ApplyFn, Params, PromptBatch, Rewards, Rollout

MESH = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
TRUNK = {}
HELD_OUT = 1024  # prompts of an evaluation
RL = Rl.model_construct(
    num_microbatches=1, advantage="leave_one_out", whiten=False, kl_coef=KL_COEF, importance_cap=0.0
)


def model_of(work: Work) -> tuple[transformer.TransformerConfig, Params, Params]:
    """The model, and its random weights: trained and frozen ones."""
    sizes = work.vocab, work.width, work.layers, work.heads, work.kv_heads, work.width // work.heads, work.mlp
    first = work.layers - work.trained_layers
    groups, pattern = (), ""
    if work.trained_layers:
        groups, pattern = (first, work.trained_layers), f"layers/({'|'.join(map(str, range(first, work.layers)))})/"
    config = transformer.TransformerConfig(*sizes, layer_groups=groups)
    shapes = apply.param_shapes(config)
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.02, shapes)
    return config, *freezing.split(params, pattern)


def rollout_of(work: Work) -> Rollout:
    """Random completions of random prompts, of full length."""
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, work.vocab, (work.batch // work.samples, work.prompt)), work.samples, axis=0)
    prompts = PromptBatch(ids.astype(np.int32), np.ones_like(ids, bool), np.arange(work.batch, dtype=np.int32))
    completions = rng.integers(0, work.vocab, (work.batch, work.new)).astype(np.int32)
    return Rollout(*prompts, completions, np.ones_like(completions, bool), np.zeros(completions.shape, np.float32))


def examiner_of(work: Work, sampler: sampling.Sampler, apply_fn: ApplyFn, trained: Params, frozen: Params) -> Any:
    """Evaluation on HELD_OUT prompts, with rewards that cost nothing."""
    prompts = PromptBatch(*(np.resize(x, (HELD_OUT, *x.shape[1:])) for x in rollout_of(work)[:3]))
    score_kl = functools.partial(scoring.sequence_kl, apply_fn, temperature=1.0, **TRUNK)
    return measure.Examiner(
        mesh=MESH,
        sampler=sampler,
        kl_to_sft=measure.make_kl_to_sft(score_kl),
        reward_fn=lambda rollout: Rewards(rollout.completion_mask.sum(1).astype(jnp.float32), {}),
        gold_fn=lambda rollout: np.zeros(len(rollout.completion_ids), np.float32),
        sft_params=jax.tree.map(lambda x: x * 1.001, trained),
        frozen_params=frozen,
        eval_prompts=prompts,
        batch_size=work.batch,
        seed=0,
    )


def make(work: Work) -> Callable[[], Any]:
    """Return the stage as a function that ends when the device has finished."""
    config, trained, frozen = model_of(work)
    if hasattr(freezing, "trunk_layers"):
        TRUNK["trunk_layers"] = freezing.trunk_layers(trained, config.stacks)
    params, apply_fn, rollout = trees.join(trained, frozen), apply.make_apply_fn(config), rollout_of(work)
    sampler = sampling.make_sampler(
        MESH,
        params,
        apply_fn=apply_fn,
        make_cache=functools.partial(transformer.init_cache, config),
        dtype=config.dtype,
        config=sampling.SamplingConfig(work.new, 1.0, (), 0),
        **TRUNK,
    )
    score = functools.partial(scoring.per_token_logps, apply_fn, temperature=1.0)
    programs = reinforce.make_programs(
        MESH,
        trained,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE)),
        score_fn=score,
        rl=RL.model_copy(update={"samples_per_prompt": work.samples}),
        ema_rate=EMA_RATE,
    )
    state = programs.init(trained) if work.stage in ("update", "rl_step") else None
    scored, examiner = jax.jit(score), examiner_of(work, sampler, apply_fn, trained, frozen)
    shares_prompts = "copies" in (sampling.sample.__kwdefaults__ or {})

    def generate(params: Any) -> Any:
        prompts = PromptBatch(*rollout[:3])
        if not shares_prompts:
            return sampler(params, prompts, jax.random.key(0))
        distinct = PromptBatch(*(x[:: work.samples] for x in prompts))
        return sampler(params, distinct, jax.random.key(0), work.samples)

    def update(rollout: Any) -> Any:
        nonlocal state
        state, metrics = programs.update(state, frozen, rollout, jnp.arange(work.batch, dtype=jnp.float32))
        return metrics

    stages: dict[str, Callable[[], Any]] = {
        "decode": lambda: generate(params),
        "score": lambda: scored(params, rollout),
        "update": lambda: update(rollout),
        "rl_step": lambda: update(generate(trees.join(state.params, frozen))),
        "evaluate": lambda: measure.evaluate(examiner, trained).reward,
    }
    return lambda: jax.block_until_ready(stages[work.stage]())


if __name__ == "__main__":
    serve(make)
