"""The programs of a config compiled ahead of time, from shapes alone, for the chips of a mesh; and what they need.

Nothing is run and no weight is made. A chip must hold the arguments, results and temporaries of the program that runs,
and every array that is alive meanwhile without being its argument: XLA sees the first, `Program.co_resident`
names the rest.
"""

import functools
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warp_jax import merging
from warp_jax.experiment import ingredients, preparation, validation
from warp_jax.experiment.programs import make_programs
from warp_jax.models import freezing, partitioning
from warp_jax.models.apply import make_apply_fn, param_shapes
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import meshes
from warp_jax.rewards import reward_functions
from warp_jax.tpu_fit import hlo
from warp_jax.training import sampling, supervised
from warp_jax.types import Params, PromptBatch, Rollout


class Program(NamedTuple):
    """What to compile. call: a jitted function; args: its arguments as shapes with shardings; beside: names in
    `Plan.resident` of what is alive meanwhile without being an argument.
    """

    name: str
    call: Any
    args: tuple[Any, ...]
    co_resident: tuple[str, ...]


class Plan(NamedTuple):
    """The programs of a config on a mesh. resident: trees of what is alive between programs, by name."""

    mesh: Mesh
    programs: tuple[Program, ...]
    resident: Mapping[str, Any]


class Compiled(NamedTuple):
    """What one program needs, in bytes per chip. peak: as XLA plans it, arguments included; beside: what is alive
    without being an argument; error: the compiler's words if the program alone is too large, all else then being 0.
    """

    name: str
    seconds: float
    arguments: int
    temporaries: int
    peak: int
    co_resident: int
    traffic: hlo.Collectives
    error: str = ""

    @property
    def total(self) -> int:
        """Bytes in use on a chip while the program runs."""
        return self.peak + self.co_resident


COPY = "copy for generation"
EVALUATION = " (evaluation)"  # end of the name of a program that evaluation runs with a batch of its own
STATE = ("policy", "anchor", "Adam moments")
WHOLE = ("policy", "frozen weights")  # the model
NO_TRAFFIC = hlo.Collectives({}, {})


def make_plan(
    config: ConfigDict, mesh: Mesh, policy: TransformerConfig, reward_model: TransformerConfig | None
) -> Plan:
    """All programs of Algorithm 1 and of what is trained before it, for models with these settings, the policy's stacks
    being cut for config.model.trainable. What is alive is that of an iteration after the first, whose init is not SFT.
    ValueError for values that the program would refuse.
    """
    validation.check_values(config, mesh)
    whole = partitioning.with_shardings(mesh, param_shapes(policy))
    trained, frozen = freezing.split(whole, config.model.trainable)
    sampling_config = sampling.SamplingConfig(
        config.sampling.max_new_tokens, config.sampling.temperature, stop_ids=(1,), pad_id=0
    )
    programs = make_programs(config, mesh, policy, sampling_config=sampling_config, trained=trained, frozen=frozen)
    state = partitioning.with_shardings(mesh, jax.eval_shape(programs.train.init, trained))
    resident = dict(zip(STATE, (state.params, state.anchor_params, state.opt_state), strict=True))
    resident |= {"init": trained, "SFT": trained, "frozen weights": frozen}
    copies, laid_out = _copy(mesh, programs.sampler, whole)
    generates: tuple[str, ...] = WHOLE  # what generation reads
    if copies:
        resident[COPY], generates = laid_out, (COPY,)
    scores = []
    if reward_model is not None:
        resident["reward model"] = partitioning.with_shardings(mesh, param_shapes(reward_model))
        scores = [functools.partial(_score, mesh, reward_model, resident["reward model"])]
    entries = [("start of a run", programs.train.init, (trained,), ("init", *STATE, COPY)), *copies]
    sizes = {"": config.rl.batch_size, EVALUATION: config.evaluation.batch_size}
    rows = {suffix: _rows(config, mesh, batch) for suffix, batch in sizes.items()}
    for suffix in sizes if len({*sizes.values()}) > 1 else ("",):
        prompts = PromptBatch(*rows[suffix][:3])
        entries.append((f"generation{suffix}", programs.sampler.generate, (laid_out, prompts, _key(mesh)), generates))
        entries += [(f"reward{suffix}", *score(rows[suffix])) for score in scores]
    rewards_ = _batch(mesh, jnp.float32, config.rl.batch_size)
    entries += [
        ("update", programs.train.update, (state, frozen, rows[""], rewards_), (*STATE, "frozen weights")),
        (
            "KL to SFT",
            programs.kl_to_sft,
            (trained, trained, frozen, rows[EVALUATION]),
            ("policy", "SFT", "frozen weights"),
        ),
        *_merging(config.warp, trained),
    ]
    entries += _supervised(config, mesh, policy, whole, reward_model)
    found = [Program(*entry[:3], tuple(name for name in resident if name not in entry[3])) for entry in entries]
    return Plan(mesh, tuple(found), resident)


# A program before what lives beside it is known: name, function, arguments, and what of `resident` these are.
Entry = tuple[str, Any, tuple[Any, ...], tuple[str, ...]]


def _copy(mesh: Mesh, sampler: sampling.Sampler, whole: Params) -> tuple[list[Entry], Params]:
    """The program that lays weights out for generation, if there is one, and its result."""
    if not isinstance(sampler.lay_out, jax.stages.Wrapped):
        return [], whole
    shapes = jax.eval_shape(sampler.lay_out, whole)
    laid_out = partitioning.shaped(shapes, partitioning.decode_shardings(mesh, shapes))
    return [(COPY, sampler.lay_out, (whole,), WHOLE)], laid_out


def _score(mesh: Mesh, model: TransformerConfig, params: Params, rollout: Rollout) -> tuple[Any, Any, Any]:
    """The reward model on prompts and completions."""
    score = jax.jit(functools.partial(reward_functions.sequence_scores, make_apply_fn(model, mesh)))
    batch, prompt = rollout.prompt_ids.shape
    shape = batch, prompt + rollout.completion_ids.shape[1]
    return score, (params, _batch(mesh, jnp.int32, *shape), _batch(mesh, jnp.bool_, *shape)), ("reward model",)


def _supervised(
    config: ConfigDict, mesh: Mesh, policy: TransformerConfig, whole: Params, reward_model: TransformerConfig | None
) -> list[Entry]:
    """Steps of SFT and of the reward model's training, where a config has them: before RL, when there is no state of a
    run. Beside each are the weights that it started from; beside the second, SFT too.
    """
    unused = ("init", *STATE, COPY)
    found: list[Entry] = []
    if config.sft.num_steps:
        loss_fn = ingredients.sft_loss(config, make_apply_fn(policy, mesh))
        call, args = _step(config, mesh, "sft", loss_fn, freezing.split(whole, config.model.trainable))
        found.append(("SFT step", call, args, (*unused, "frozen weights", "reward model")))
    if reward_model is not None and preparation.needs_reward_model(config):
        loss_fn = ingredients.reward_loss(config, make_apply_fn(reward_model, mesh))
        start = partitioning.with_shardings(mesh, param_shapes(reward_model))
        parts = freezing.split(start, config.reward_model.trainable)
        call, args = _step(config, mesh, "reward_model", loss_fn, parts)
        found.append(("reward model step", call, args, unused))
    return found


def _step(
    config: ConfigDict, mesh: Mesh, name: str, loss_fn: supervised.LossFn, parts: tuple[Params, Params]
) -> tuple[Any, tuple[Any, ...]]:
    """The program of a step of a supervised stage on what is trained and what is frozen, and its arguments."""
    stage, (trained, frozen) = config[name], parts
    programs = supervised.make_programs(mesh, loss_fn, trained, ingredients.make_optimizer(stage, config.adam))
    state = partitioning.with_shardings(mesh, jax.eval_shape(programs.init, trained))
    shape = stage.batch_size, stage.sequence_tokens
    batch = {"token_ids": _batch(mesh, jnp.int32, *shape), "mask": _batch(mesh, jnp.bool_, *shape)}
    if name == "reward_model":
        batch["labels"] = _batch(mesh, jnp.int32, stage.batch_size)
    return programs.update, (state, frozen, batch)


def _merging(config: ConfigDict, trained: Params) -> list[Entry]:
    """Between runs, when there is no state of one. A merge is two passes, between which the host finds coefficients;
    the second is a sum, whatever the method. They run leaf by leaf, which needs no more than all leaves at once.
    """
    gram = jax.jit(lambda init, policies: merging.gram(init, policies, config.unit).matrix)
    policies, used = [trained] * config.num_runs, ("init", *STATE, COPY)
    return [
        ("Gram matrix", gram, (trained, policies), used),
        ("merge", jax.jit(merging.lerp), (trained, policies), used),
        ("LITI", jax.jit(functools.partial(merging.liti, liti_rate=config.liti_rate)), (trained, trained), used),
    ]


def chip_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes with shardings on the fullest chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def compile_program(plan: Plan, program: Program) -> Compiled:
    """Compile one program of a plan."""
    co_resident = sum(chip_bytes(plan.resident[name]) for name in program.co_resident)
    started = time.monotonic()
    try:
        compiled = program.call.lower(*program.args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.monotonic() - started
        return Compiled(program.name, seconds, chip_bytes(program.args), 0, 0, co_resident, NO_TRAFFIC, str(error))
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    return Compiled(
        name=program.name,
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        co_resident=co_resident,
        traffic=hlo.collectives(compiled.as_text()),
    )


def _rows(config: ConfigDict, mesh: Mesh, batch: int) -> Rollout:
    prompt, completion = config.sampling.prompt_tokens, config.sampling.max_new_tokens
    return Rollout(
        prompt_ids=_batch(mesh, jnp.int32, batch, prompt),
        prompt_mask=_batch(mesh, jnp.bool_, batch, prompt),
        example_ids=_batch(mesh, jnp.int32, batch),
        completion_ids=_batch(mesh, jnp.int32, batch, completion),
        completion_mask=_batch(mesh, jnp.bool_, batch, completion),
        per_token_logps=_batch(mesh, jnp.float32, batch, completion),
    )


def _batch(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(mesh))


def _key(mesh: Mesh) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=meshes.replicated(mesh))
