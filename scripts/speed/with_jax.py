"""Stages of training in warp_jax, from PYTHONPATH: so scripts/benchmark.py can measure another checkout too.

Weights are random. A stage makes only what it needs, so that its peak memory is that of training.
"""

import functools
import inspect
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from protocol import EMA_RATE, KL_COEF, LEARNING_RATE, STOP, Facts, Work, serve, stop_log_odds

from configs import default
from warp_jax import merging, trees
from warp_jax.evaluation import measure
from warp_jax.models import apply, freezing, transformer
from warp_jax.parallel import meshes
from warp_jax.settings.groups import Rl
from warp_jax.training import reinforce, scoring
from warp_jax.types import ApplyFn, Params, PromptBatch, Rewards, Rollout

try:
    from warp_jax.generation import sampling
    from warp_jax.training import anchors
except ImportError:  # a checkout from before these modules
    from warp_jax.training import sampling
try:
    from warp_jax.training.optimizers import clip_by_global_norm
except ImportError:
    from optax import clip_by_global_norm

MESH = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
HELD_OUT = 1024  # prompts of an evaluation
RL = Rl.model_construct(
    num_microbatches=1, advantage="leave_one_out", whiten=False, kl_coef=KL_COEF, importance_cap=0.0
)


class Model(NamedTuple):
    """A model and its weights, trained and frozen ones."""

    config: transformer.TransformerConfig
    apply_fn: ApplyFn
    trained: Params
    frozen: Params


def make_model(work: Work) -> Model:
    """The model with random weights."""
    first = work.layers - work.trained_layers
    groups, pattern = (), ""
    if work.trained_layers:
        groups, pattern = (first, work.trained_layers), f"layers/({'|'.join(map(str, range(first, work.layers)))})/"
    config = transformer.TransformerConfig(*work.sizes, layer_groups=groups, remat=default.get_config().model.remat)
    shapes = apply.param_shapes(config)
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.02, shapes)
    return Model(config, apply.make_apply_fn(config), *freezing.split(params, pattern))


def rollout_of(work: Work) -> Rollout:
    """Random completions of random prompts, of full length."""
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, work.vocab, (work.batch // work.samples, work.prompt)), work.samples, axis=0)
    prompts = PromptBatch(ids.astype(np.int32), np.ones_like(ids, bool), np.arange(work.batch, dtype=np.int32))
    completions = rng.integers(0, work.vocab, (work.batch, work.longest)).astype(np.int32)
    return Rollout(*prompts, completions, np.ones_like(completions, bool), np.zeros(completions.shape, np.float32))


def with_mixed_lengths(apply_fn: ApplyFn, work: Work) -> ApplyFn:
    """Give the stop token the probabilities of `stop_log_odds`; the cache knows how many tokens each row has."""
    log_odds = jnp.array(stop_log_odds(work))

    def apply_with_lengths(params: Params, ids: Any, mask: Any, cache: Any, **options: Any) -> Any:
        logits, cache = apply_fn(params, ids, mask, cache, **options)
        so_far = jnp.clip(cache.valid.sum(axis=1) - work.prompt, 0, work.longest - 1)
        others = logits[:, -1].at[:, STOP].set(-jnp.inf)
        stop = jax.nn.logsumexp(others, axis=-1) + log_odds[so_far]
        return logits.at[:, -1, STOP].set(stop), cache

    return apply_with_lengths


def shared_layers(model: Model) -> dict[str, int]:
    """Frozen layers that an evaluation computes once for the policy and SFT; earlier versions have no such option."""
    if not hasattr(freezing, "trunk_layers"):
        return {}
    return {"trunk_layers": freezing.trunk_layers(model.trained, model.config.stacks)}


def make_sampler(work: Work, model: Model) -> sampling.Sampler:
    """The sampler of a job, for completions of the lengths that are asked for."""
    return sampling.make_sampler(
        MESH,
        trees.join(model.trained, model.frozen),
        apply_fn=with_mixed_lengths(model.apply_fn, work) if work.is_mixed else model.apply_fn,
        make_cache=functools.partial(transformer.init_cache, model.config),
        dtype=model.config.dtype,
        config=sampling.SamplingConfig(work.longest, 1.0, (STOP,) if work.is_mixed else (), STOP),
        **shared_layers(model),
    )


def make_generate(work: Work, model: Model) -> Callable[[Params], Rollout]:
    """Sampling from weights of the whole model; ends when the device has finished, as rewards need completions."""
    sampler, prompts = make_sampler(work, model), PromptBatch(*rollout_of(work)[:3])
    shares_prompts = "copies" in inspect.signature(sampling.Sampler.__call__).parameters
    keys = map(jax.random.key, itertools.count())

    def generate(params: Params) -> Rollout:
        if not shares_prompts:
            return jax.block_until_ready(sampler(params, prompts, next(keys)))
        distinct = PromptBatch(*(x[:: work.samples] for x in prompts))
        return jax.block_until_ready(sampler(params, distinct, next(keys), work.samples))

    return generate


def make_update(work: Work, model: Model) -> tuple[Any, Callable[[Any, Rollout], tuple[Any, Facts]]]:
    """The first state of training, and one step on a rollout: (state, rollout) -> (state, facts)."""
    if work.is_plain:  # XLA computes the average at rate 0 too
        merging.ema_update = lambda anchor, params, rate: anchor
    shared = {"copies": work.samples} if "copies" in inspect.signature(scoring.per_token_logps).parameters else {}
    parts: dict[str, Any] = {
        "score_fn": functools.partial(scoring.per_token_logps, model.apply_fn, temperature=1.0, **shared),
        "optimizer": optax.chain(clip_by_global_norm(1.0), optax.adam(LEARNING_RATE)),
        "rl": RL.model_copy(update={"samples_per_prompt": work.samples}),
    }
    if hasattr(reinforce, "Rule"):
        programs = reinforce.make_programs(MESH, model.trained, reinforce.Rule(**parts, anchor=anchors.ema(EMA_RATE)))
    else:  # a checkout from before the other anchors
        programs = reinforce.make_programs(MESH, model.trained, ema_rate=EMA_RATE, **parts)
    frozen, rewards = model.frozen, jnp.arange(work.batch, dtype=jnp.float32)

    def update(state: Any, rollout: Rollout) -> tuple[Any, Facts]:
        state, metrics = jax.block_until_ready(programs.update(state, frozen, rollout, rewards))
        tokens = round(float(metrics["length"]) * work.batch)
        return state, {"tokens": tokens, "grad_norm": float(metrics["grad_norm"])}

    return programs.init(model.trained), update


def decode(work: Work) -> Callable[[], Facts]:
    """Sampling alone."""
    model = make_model(work)
    params, generate = trees.join(model.trained, model.frozen), make_generate(work, model)
    return lambda: {"tokens": int(generate(params).completion_mask.sum())}


def score(work: Work) -> Callable[[], Facts]:
    """Log-probabilities of given completions."""
    model, rollout = make_model(work), rollout_of(work)
    params = trees.join(model.trained, model.frozen)
    scored = jax.jit(functools.partial(scoring.per_token_logps, model.apply_fn, temperature=1.0))
    return lambda: {"tokens": jax.block_until_ready(scored(params, rollout)).size}


def update(work: Work) -> Callable[[], Facts]:
    """The update alone. The initial weights are gone: the state holds the only copies."""
    state, step = make_update(work, make_model(work))
    rollout = rollout_of(work)

    def run() -> Facts:
        nonlocal state
        state, facts = step(state, rollout)
        return facts

    return run


def rl_step(work: Work) -> Callable[[], Facts]:
    """Sampling, and the update on what was sampled. SFT's weights stay in memory, as in a job."""
    model = make_model(work)
    generate, (state, step) = make_generate(work, model), make_update(work, model)

    def run() -> Facts:
        nonlocal state
        began = time.perf_counter()
        rollout = generate(trees.join(state.params, model.frozen))
        seconds = time.perf_counter() - began
        state, facts = step(state, rollout)
        return {**facts, "generate_s": seconds}

    return run


def evaluate(work: Work) -> Callable[[], Facts]:
    """Evaluation of a policy on HELD_OUT prompts, with rewards that cost nothing."""
    model = make_model(work)
    score_kl = functools.partial(scoring.sequence_kl, model.apply_fn, temperature=1.0, **shared_layers(model))
    examiner = measure.Examiner(
        mesh=MESH,
        sampler=make_sampler(work, model),
        kl_to_sft=measure.make_kl_to_sft(score_kl),
        reward_fn=lambda rollout: Rewards(rollout.completion_mask.sum(1).astype(jnp.float32), {}),
        gold_fn=lambda rollout: np.zeros(len(rollout.completion_ids), np.float32),
        sft_params=jax.tree.map(lambda x: x * 1.001, model.trained),
        frozen_params=model.frozen,
        eval_prompts=PromptBatch(*(np.resize(x, (HELD_OUT, *x.shape[1:])) for x in rollout_of(work)[:3])),
        batch_size=work.batch,
        seed=0,
    )
    return lambda: {"tokens": int(np.sum(measure.evaluate(examiner, model.trained).reward))}


def merge(work: Work) -> Callable[[], Facts]:
    """SLERP of two policies near the initial weights, one angle a layer."""
    init = make_model(work).trained

    def policy(seed: int) -> Params:
        return jax.tree.map(lambda x: x + 2e-4 * jax.random.normal(jax.random.key(seed + x.size), x.shape), init)

    policies = [policy(1), policy(2)]

    def run() -> Facts:
        merged = jax.block_until_ready(merging.slerp(init, policies))
        return {"weights": sum(x.size for x in jax.tree.leaves(merged))}

    return run


STAGES = {f.__name__: f for f in (decode, score, update, rl_step, evaluate, merge)}


def make(work: Work) -> Callable[[], Facts]:
    """Return the stage as a function that ends when the device has finished."""
    return STAGES[work.stage](work)


if __name__ == "__main__":
    serve(make)
