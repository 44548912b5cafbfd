"""Ahead-of-time compilation of all programs of a config for the chips of a mesh, from shapes alone.

Nothing is run and no weights are made. While a program runs, a chip must hold its arguments, results and temporaries,
which XLA counts, and the co-resident arrays: those that stay in memory but are no argument of it.
"""

import functools
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from warp_jax import merging
from warp_jax.experiment import ingredients
from warp_jax.experiment.programs import make_programs
from warp_jax.models import freezing, partitioning
from warp_jax.models.apply import make_apply_fn, param_shapes
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import meshes
from warp_jax.rewards import reward_functions
from warp_jax.settings import Settings, check_devices
from warp_jax.settings.groups import RewardModel, Sft
from warp_jax.tpu_fit import hlo
from warp_jax.training import optimizers, sampling, supervised
from warp_jax.types import Params, PromptBatch, Rollout

Names = tuple[str, ...]  # keys of Plan.resident


class Program(NamedTuple):
    """A jitted function, its arguments as shapes with shardings, and the names of its co-resident trees."""

    name: str
    call: Any
    args: tuple[Any, ...]
    co_resident: Names


class Plan(NamedTuple):
    """The programs of a config on a mesh, and the trees that stay in memory between programs, by name."""

    mesh: Mesh
    programs: tuple[Program, ...]
    resident: Mapping[str, Any]


class Compiled(NamedTuple):
    """Bytes that one program needs per chip. If `error` is set, temporaries, peak and traffic are unknown (0)."""

    name: str
    seconds: float  # of compilation
    arguments: int
    temporaries: int
    peak: int  # as planned by XLA, arguments included
    co_resident: int
    traffic: hlo.Collectives
    error: str = ""  # of the compiler, if the program alone is too large

    @property
    def total(self) -> int:
        """Bytes in use on a chip while the program runs."""
        return self.peak + self.co_resident


COPY = "copy for generation"
EVALUATION = " (evaluation)"  # suffix of the programs that evaluation runs with its own batch size
STATE = ("policy", "anchor", "Adam moments")
WHOLE = ("policy", "frozen weights")  # all weights of the policy
RUN_ONLY = ("init", *STATE, COPY)  # in memory only during a run
NO_TRAFFIC = hlo.Collectives({}, {})


def make_plan(
    settings: Settings, mesh: Mesh, policy: TransformerConfig, reward_model: TransformerConfig | None
) -> Plan:
    """Plan the programs of Algorithm 1 and of the supervised training before it, for models of these sizes.

    The policy's stacks of layers must be cut for config.model.trainable. The resident trees are those of an iteration
    after the first, whose init differs from SFT. Raises ValueError if a job would refuse this config on this mesh.
    """
    check_devices(settings, meshes.batch_devices(mesh))
    planner = _Planner(settings, mesh, policy, reward_model)
    programs = [planner.start_of_run()]
    if COPY in planner.resident:
        programs.append(planner.copy())
    batches = {"": settings.rl.batch_size, EVALUATION: settings.evaluation.batch_size}
    if batches[""] == batches[EVALUATION]:
        del batches[EVALUATION]
    for suffix, batch in batches.items():
        programs.append(planner.generation(suffix, batch))
        if reward_model is not None:
            programs.append(planner.reward(suffix, batch, reward_model))
    programs += [planner.update(), planner.kl_to_sft(), planner.gram_matrix(), planner.merge(), planner.liti()]
    if settings.sft.num_steps:
        programs.append(planner.sft_step(policy))
    if reward_model is not None and settings.needs_reward_model:
        programs.append(planner.reward_model_step(reward_model))
    return Plan(mesh, tuple(programs), planner.resident)


class _Planner:
    """Makes the programs of a plan, one per method. Its trees hold shapes with shardings instead of arrays."""

    def __init__(
        self, settings: Settings, mesh: Mesh, policy: TransformerConfig, reward_model: TransformerConfig | None
    ) -> None:
        self.settings, self.mesh = settings, mesh
        self.weights = partitioning.with_shardings(mesh, param_shapes(policy))
        self.trained, self.frozen = freezing.split(self.weights, settings.model.trainable)
        sizes = settings.sampling
        sampler = sampling.SamplingConfig(sizes.max_new_tokens, sizes.temperature, stop_ids=(1,), pad_id=0)
        self.functions = make_programs(
            settings, mesh, policy, sampling_config=sampler, trained=self.trained, frozen=self.frozen
        )
        self.state = partitioning.with_shardings(mesh, jax.eval_shape(self.functions.train.init, self.trained))
        trees = (self.state.params, self.state.anchor_params, self.state.opt_state)
        self.resident: dict[str, Any] = dict(zip(STATE, trees, strict=True))
        self.resident |= {"init": self.trained, "SFT": self.trained, "frozen weights": self.frozen}
        if isinstance(self.functions.sampler.lay_out, jax.stages.Wrapped):  # else generation reads the policy itself
            shapes = jax.eval_shape(self.functions.sampler.lay_out, self.weights)
            self.resident[COPY] = partitioning.shaped(shapes, partitioning.decode_shardings(mesh, shapes))
        if reward_model is not None:
            self.resident["reward model"] = partitioning.with_shardings(mesh, param_shapes(reward_model))

    def program(self, name: str, call: Any, args: tuple[Any, ...], *, reads: Names, absent: Names = ()) -> Program:
        """Return a program that gets the resident trees `reads` as arguments, and runs when `absent` do not exist."""
        return Program(name, call, args, tuple(tree for tree in self.resident if tree not in (*reads, *absent)))

    def start_of_run(self) -> Program:
        init = self.functions.train.init
        return self.program("start of a run", init, (self.trained,), reads=("init",), absent=RUN_ONLY)

    def copy(self) -> Program:
        """The copy of the weights for generation. The previous copy counts as co-resident."""
        return self.program(COPY, self.functions.sampler.lay_out, (self.weights,), reads=WHOLE)

    def generation(self, suffix: str, batch: int) -> Program:
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=meshes.replicated(self.mesh))
        args = self.resident.get(COPY, self.weights), PromptBatch(*self._rollout(batch)[:3]), key
        reads = (COPY,) if COPY in self.resident else WHOLE
        return self.program(f"generation{suffix}", self.functions.sampler.generate, args, reads=reads)

    def reward(self, suffix: str, batch: int, model: TransformerConfig) -> Program:
        score = jax.jit(functools.partial(reward_functions.sequence_scores, make_apply_fn(model, self.mesh)))
        shape = batch, self.settings.sampling.prompt_tokens + self.settings.sampling.max_new_tokens
        args = self.resident["reward model"], self._rows(jnp.int32, *shape), self._rows(jnp.bool_, *shape)
        return self.program(f"reward{suffix}", score, args, reads=("reward model",))

    def update(self) -> Program:
        batch = self.settings.rl.batch_size
        args = self.state, self.frozen, self._rollout(batch), self._rows(jnp.float32, batch)
        return self.program("update", self.functions.train.update, args, reads=(*STATE, "frozen weights"))

    def kl_to_sft(self) -> Program:
        args = self.trained, self.trained, self.frozen, self._rollout(self.settings.evaluation.batch_size)
        return self.program("KL to SFT", self.functions.kl_to_sft, args, reads=(*WHOLE, "SFT"))

    def gram_matrix(self) -> Program:
        """First pass of a merge, on all leaves at once. A job merges leaf by leaf and needs no more memory."""
        unit, policies = self.settings.warp.unit, [self.trained] * self.settings.warp.num_runs
        gram = jax.jit(lambda init, policies: merging.gram(init, policies, unit).matrix)
        return self.program("Gram matrix", gram, (self.trained, policies), reads=("init",), absent=RUN_ONLY)

    def merge(self) -> Program:
        """Second pass of a merge: a weighted sum, whatever the method."""
        policies = [self.trained] * self.settings.warp.num_runs
        return self.program("merge", jax.jit(merging.lerp), (self.trained, policies), reads=("init",), absent=RUN_ONLY)

    def liti(self) -> Program:
        liti = jax.jit(functools.partial(merging.liti, liti_rate=self.settings.warp.liti_rate))
        return self.program("LITI", liti, (self.trained, self.trained), reads=("init",), absent=RUN_ONLY)

    def sft_step(self, model: TransformerConfig) -> Program:
        """Step of SFT. Its start weights are co-resident, under the name SFT."""
        loss_fn = ingredients.sft_loss(self.settings, make_apply_fn(model, self.mesh))
        call, args = self._supervised_step(self.settings.sft, loss_fn, self.trained, self.frozen)
        return self.program("SFT step", call, args, reads=("frozen weights",), absent=(*RUN_ONLY, "reward model"))

    def reward_model_step(self, model: TransformerConfig) -> Program:
        """Step of the reward model's training. Its start weights are co-resident, under the name reward model."""
        loss_fn = ingredients.reward_loss(self.settings, make_apply_fn(model, self.mesh))
        trained, frozen = freezing.split(self.resident["reward model"], self.settings.reward_model.trainable)
        call, args = self._supervised_step(self.settings.reward_model, loss_fn, trained, frozen)
        return self.program("reward model step", call, args, reads=(), absent=RUN_ONLY)

    def _supervised_step(
        self, group: Sft | RewardModel, loss_fn: supervised.LossFn, trained: Params, frozen: Params
    ) -> tuple[Any, tuple[Any, ...]]:
        """The step function that is configured in `group`, and its arguments."""
        optimizer = optimizers.make_optimizer(group, self.settings.adam)
        programs = supervised.make_programs(self.mesh, loss_fn, trained, optimizer)
        state = partitioning.with_shardings(self.mesh, jax.eval_shape(programs.init, trained))
        shape = group.batch_size, group.sequence_tokens
        batch = {"token_ids": self._rows(jnp.int32, *shape), "mask": self._rows(jnp.bool_, *shape)}
        if isinstance(group, RewardModel):
            batch["labels"] = self._rows(jnp.int32, group.batch_size)
        return programs.update, (state, frozen, batch)

    def _rollout(self, batch: int) -> Rollout:
        prompt, completion = self.settings.sampling.prompt_tokens, self.settings.sampling.max_new_tokens
        return Rollout(
            prompt_ids=self._rows(jnp.int32, batch, prompt),
            prompt_mask=self._rows(jnp.bool_, batch, prompt),
            example_ids=self._rows(jnp.int32, batch),
            completion_ids=self._rows(jnp.int32, batch, completion),
            completion_mask=self._rows(jnp.bool_, batch, completion),
            per_token_logps=self._rows(jnp.float32, batch, completion),
        )

    def _rows(self, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh))


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
