"""Ahead-of-time compilation of all programs of a config for the chips of a mesh, from shapes alone.

Nothing is run and no weights are made. While a program runs, a chip must hold its arguments, results and temporaries,
which XLA counts, and the co-resident arrays: those that stay in memory but are no argument of it.
"""

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from warp_jax import merging, trees
from warp_jax.evaluation import measure
from warp_jax.experiment import architecture, ingredients
from warp_jax.experiment.programs import make_programs
from warp_jax.generation import sampling
from warp_jax.models import freezing, partitioning
from warp_jax.models.apply import make_apply_fn, param_shapes
from warp_jax.parallel import meshes
from warp_jax.rewards import reward_functions
from warp_jax.settings import Settings, check_devices
from warp_jax.settings.groups import RewardModel, Sft
from warp_jax.tpu_fit import hlo
from warp_jax.training import loop, optimizers, reinforce, supervised
from warp_jax.types import Params, PromptBatch, Rollout, TrainState

Names = tuple[str, ...]  # keys of Plan.resident


class Program(NamedTuple):
    """A jitted function, its arguments as shapes with shardings, and its co-resident trees by name."""

    name: str
    call: Any
    args: tuple[Any, ...]
    co_resident: Mapping[str, Any]


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
EXPANDED = "weights of the policy"  # with LoRA: made of its factors for generation and evaluation
EVALUATION = " (evaluation)"  # suffix of the programs that evaluation runs with its own batch size or dtype
STATE = ("policy", "anchor", "Adam moments")
REWARD: Names = ("reward model", "frozen weights of the reward model")
RUN_ONLY = ("init", *STATE, EXPANDED, COPY)  # in memory only during a run
NO_TRAFFIC = hlo.Collectives({}, {})


def make_plan(settings: Settings, devices: Sequence[jax.Device]) -> Plan:
    """Plan the programs of Algorithm 1 and of the supervised training before it, on a mesh of these devices.

    The resident trees are those of an iteration after the first, whose init differs from SFT. Raises ValueError if a
    job would refuse this config on this mesh.
    """
    mesh = meshes.make_mesh(settings.mesh, devices)
    check_devices(settings, meshes.batch_devices(mesh))
    planner = _Planner(settings, mesh)
    programs = (*planner.rl(), *planner.merges(), *planner.supervised_steps())
    return Plan(mesh, programs, planner.resident)


class _Planner:
    """Makes the programs of a plan. Its trees hold shapes with shardings instead of arrays."""

    def __init__(self, settings: Settings, mesh: Mesh) -> None:
        self.settings, self.mesh = settings, mesh
        self.policy, self.reward_model = architecture.planned(settings)
        self.weights = partitioning.with_shardings(mesh, param_shapes(self.policy))
        self.trained, self.frozen = freezing.split(self.weights, *settings.model.trained)
        self.functions = make_programs(
            settings, mesh, self.policy, trained=self.trained, frozen=self.frozen, stop_ids=(1,), pad_id=0
        )
        self.state = self._state(self.functions.train[0])
        self.resident: dict[str, Any] = dict(zip(STATE, self.state[1:], strict=True))  # without the step
        self.resident |= {"init": self.trained, "SFT": self.trained, "frozen weights": self.frozen}
        self.whole: Names = ("policy", "frozen weights")  # all weights of the policy
        if settings.model.lora.rank:
            self.resident[EXPANDED] = self.trained
            self.whole = (EXPANDED, "frozen weights")
        if self._copied(self.policy.dtype):
            self.resident[COPY] = self._laid_out(self.policy.dtype)
        if self.reward_model is not None:
            weights = partitioning.with_shardings(mesh, param_shapes(self.reward_model))
            trained_here = settings.reward_model.trainable if settings.needs_reward_model else ""  # "" matches all
            self.resident |= dict(zip(REWARD, freezing.split(weights, trained_here), strict=True))

    def program(self, name: str, call: Any, *args: Any, reads: Names, absent: Names = ()) -> Program:
        """Return a program that gets the resident trees `reads` as arguments, and runs when `absent` do not exist."""
        gone = (*reads, *absent)
        return Program(name, call, args, {key: tree for key, tree in self.resident.items() if key not in gone})

    def _laid_out(self, dtype: str) -> Params:
        """The weights that a sampler of this dtype lays out."""
        return sampling.laid_out(meshes.regroup(self.mesh, self.settings.sampling.tensor), self.weights, dtype)

    def _copied(self, dtype: str) -> list[tuple[Any, Any]]:
        """(leaf, copy) of the leaves that a sampler of this dtype copies, the largest first; the others it reads."""
        pairs = list(zip(*map(jax.tree.leaves, (self.weights, self._laid_out(dtype))), strict=True))
        copied = [pair for pair in pairs if isinstance(sampling.make_copier(*pair), jax.stages.Wrapped)]
        return sorted(copied, key=lambda pair: -chip_bytes(pair[1]))

    def copy(self, suffix: str, dtype: str) -> Program:
        """The copy of the largest leaf for generation, made last. This leaf of the policy counts twice."""
        (largest, *rest), name = self._copied(dtype), f"{COPY}{suffix}"
        program = self.program(name, sampling.make_copier(*largest), largest[0], reads=(), absent=(COPY,))
        return program._replace(co_resident={**program.co_resident, COPY: [copy for _, copy in rest]})

    def rl(self) -> Iterator[Program]:
        """Start of a run, step of RL, and evaluation with its own batch size and dtype."""
        functions, train, evaluation = self.functions, self.settings.rl.batch_size, self.settings.evaluation.batch_size
        yield self.program("start of a run", functions.train[0].init, self.trained, reads=("init",), absent=RUN_ONLY)
        weights, reads = self.weights, self.whole
        if EXPANDED in self.resident:
            factors = self.state.params, self.trained
            yield self.program(EXPANDED, functions.train[0].weights, *factors, reads=("policy", "init", EXPANDED))
        if COPY in self.resident:
            yield self.copy("", self.policy.dtype)
            weights, reads = self.resident[COPY], (COPY,)
        copies = reinforce.shared_samples(self.settings.rl, self.mesh)
        generate = functools.partial(functions.sampler.generate, copies=copies)
        yield self.generation("", generate, self._prompts(train // copies), weights, reads)
        yield from self.reward("", train)
        if functions.evaluation_sampler is not functions.sampler:
            dtype = self.settings.evaluation.dtype
            weights, reads = self.weights, self.whole
            if self._copied(dtype):
                yield self.copy(EVALUATION, dtype)
                weights, reads = self._laid_out(dtype), ()
        evaluate = functions.evaluation_sampler.generate_with_states
        settings = self.settings.evaluation
        batches = min(measure.CALL_BATCHES, settings.num_prompts * settings.samples_per_prompt // evaluation)
        prompts = self._prompts(batches, evaluation)
        yield self.generation(EVALUATION, evaluate, prompts, weights, reads)
        if evaluation != train:
            yield from self.reward(EVALUATION, evaluation)
        yield from self.updates()
        sampled = jax.eval_shape(evaluate, weights, prompts, self._key())
        sampled = jax.tree.map(lambda x: self._rows(x.dtype, *x.shape, axis=1), sampled)
        batch = jax.tree.map(lambda x: self._rows(x.dtype, *x.shape[1:]), sampled)
        models = self.trained, self.trained, self.frozen
        kl = self.program("KL to SFT", functions.kl_to_sft, *models, *batch, reads=(*self.whole, "SFT"))
        yield kl._replace(co_resident={**kl.co_resident, "completions of a call": sampled})
        if settings.text:
            texts = self.trained, self.frozen, *self._texts(evaluation, settings.text_tokens)
            yield self.program(f"held-out texts{EVALUATION}", functions.text_losses, *texts, reads=self.whole)

    def updates(self) -> Iterator[Program]:
        """The update of the first run, and those of runs with other settings."""
        batch, seen = self.settings.rl.batch_size, list[Any]()
        fixed, start = (self.weights, ("init",)) if EXPANDED in self.resident else (self.frozen, ())
        rollout = self._rollout(batch)
        if self.settings.sampling.truncates:
            bits = self._rows(jnp.uint8, *rollout.completion_ids.shape, -(-self.policy.vocab_size // 8))
            rollout = rollout._replace(allowed=bits)
        for run, functions in enumerate(self.functions.train, 1):
            if functions not in seen:
                args = self._state(functions), fixed, rollout, self._rows(jnp.float32, batch)
                name = f"update (run {run})" if seen else "update"
                yield self.program(name, functions.update, *args, reads=(*STATE, "frozen weights", *start))
                seen.append(functions)

    def _state(self, functions: loop.Programs[TrainState]) -> TrainState:
        state: TrainState = partitioning.with_shardings(self.mesh, jax.eval_shape(functions.init, self.trained))
        return state

    def generation(self, suffix: str, generate: Any, prompts: PromptBatch, weights: Any, reads: Names) -> Program:
        """Generation for these prompts from `weights`, laid out for its sampler."""
        call = jax.jit(generate, out_shardings=meshes.batch_sharding(self.mesh, prompts.prompt_ids.ndim - 2))
        return self.program(f"generation{suffix}", call, weights, prompts, self._key(), reads=reads)

    def reward(self, suffix: str, batch: int) -> Iterator[Program]:
        """The reward of so many completions, if a model computes it."""
        if self.reward_model is not None:
            apply_fn = make_apply_fn(self.reward_model, self.mesh)
            score = jax.jit(functools.partial(reward_functions.sequence_scores, apply_fn))
            length = self.settings.sampling.prompt_tokens + self.settings.sampling.max_new_tokens
            scored = trees.join(*(self.resident[name] for name in REWARD)), *self._texts(batch, length)
            yield self.program(f"reward{suffix}", score, *scored, reads=REWARD)

    def _key(self) -> Any:
        return partitioning.shaped(jax.eval_shape(jax.random.key, 0), meshes.replicated(self.mesh))

    def merges(self) -> Iterator[Program]:
        """Both passes of a merge (the weighted sum is the same for every method) and LITI, on all leaves at once.

        A job merges leaf by leaf and does not need more memory.
        """
        warp, policies = self.settings.warp, [self.trained] * self.settings.warp.num_runs
        gram = jax.jit(lambda init, policies: merging.gram(init, policies, warp.unit).matrix)
        liti = jax.jit(functools.partial(merging.liti, liti_rate=warp.liti_rate))
        common: dict[str, Names] = {"reads": ("init",), "absent": RUN_ONLY}
        yield self.program("Gram matrix", gram, self.trained, policies, **common)
        yield self.program("merge", jax.jit(merging.lerp), self.trained, policies, **common)
        yield self.program("LITI", liti, self.trained, self.trained, **common)

    def supervised_steps(self) -> Iterator[Program]:
        """Steps of SFT and of the reward model. Start weights are co-resident, named SFT and reward model."""
        settings = self.settings
        if settings.sft.num_steps:
            loss_fn = ingredients.sft_loss(settings, make_apply_fn(self.policy, self.mesh))
            trained, frozen = freezing.split(self.weights, settings.model.trainable)
            step, *args = self._supervised_step(settings.sft, loss_fn, trained, frozen)
            yield Program("SFT step", step, tuple(args), {"SFT": trained})
        if self.reward_model is not None and settings.needs_reward_model:
            loss_fn = ingredients.reward_loss(settings, make_apply_fn(self.reward_model, self.mesh))
            step = self._supervised_step(settings.reward_model, loss_fn, *(self.resident[name] for name in REWARD))
            yield self.program("reward model step", *step, reads=REWARD[1:], absent=RUN_ONLY)

    def _supervised_step(
        self, group: Sft | RewardModel, loss_fn: supervised.LossFn, trained: Params, frozen: Params
    ) -> tuple[Any, ...]:
        """The step function that is configured in `group`, and its arguments."""
        optimizer = optimizers.make_optimizer(group, self.settings.adam)
        parts = group.num_microbatches if isinstance(group, Sft) else 1
        programs = supervised.make_programs(self.mesh, loss_fn, trained, optimizer, parts)
        state = partitioning.with_shardings(self.mesh, jax.eval_shape(programs.init, trained))
        batch = dict(zip(("token_ids", "mask"), self._texts(group.batch_size, group.sequence_tokens), strict=True))
        if ("sft" if isinstance(group, Sft) else "reward_model") in self.settings.response_fields:
            batch[supervised.COUNTED] = self._rows(jnp.bool_, group.batch_size, group.sequence_tokens)
        elif isinstance(group, RewardModel):
            batch["labels"] = self._rows(jnp.int32, group.batch_size)
        return programs.update, state, frozen, batch

    def _prompts(self, *rows: int) -> PromptBatch:
        """Prompts [*rows, ...]: a batch, or several batches."""
        length, axis = self.settings.sampling.prompt_tokens, len(rows) - 1
        token_ids, mask = (self._rows(dtype, *rows, length, axis=axis) for dtype in (jnp.int32, jnp.bool_))
        return PromptBatch(token_ids, mask, self._rows(jnp.int32, *rows, axis=axis))

    def _rollout(self, batch: int) -> Rollout:
        completion = self.settings.sampling.max_new_tokens
        return Rollout(
            *self._prompts(batch), *self._texts(batch, completion), self._rows(jnp.float32, batch, completion)
        )

    def _texts(self, batch: int, length: int) -> tuple[Any, Any]:
        """Token ids and mask."""
        return self._rows(jnp.int32, batch, length), self._rows(jnp.bool_, batch, length)

    def _rows(self, dtype: Any, *shape: int, axis: int = 0) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(self.mesh, axis))


def chip_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes with shardings on the fullest chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def compile_program(program: Program) -> Compiled:
    """Compile one program."""
    co_resident = chip_bytes(program.co_resident)
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
