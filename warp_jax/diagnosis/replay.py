"""Replay of a step that was not finite: repeat it from a saved state, and show what broke first. Nothing is saved."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from warp_jax import files, trees
from warp_jax.data.corpus import Corpus
from warp_jax.experiment import architecture, ingredients, preparation, warp, workdir
from warp_jax.parallel import hosts, meshes
from warp_jax.progress import JobProgress
from warp_jax.settings import Settings
from warp_jax.training import loop, optimizers, reinforce, supervised
from warp_jax.types import Params, Rollout

SHOWN = 3  # rows or weights in one line
SHOWN_TEXT = 60  # characters of a prompt or completion
RUN = re.compile(r"iteration (\d+) run (\d+)")


class Step(NamedTuple):
    """A repeated step: the quantities that it computes, in this order, and the rows of its batch."""

    quantities: Mapping[str, Any]  # arrays whose first axis is the batch, or trees of other arrays
    split: str  # split of the data that holds the rows
    rows: np.ndarray  # int [B]
    texts: list[str]  # one per row


def replay(settings: Settings, corpora: Mapping[str, Corpus], folder: Path, path: Path) -> tuple[str, bool]:
    """Repeat the step of a replay file; return what to print, and True if a number is not finite.

    Raises ValueError if the file or the workdir belongs to another job.
    """
    workdir.check_unchanged(settings, folder, corpora)
    part, number = read(path, settings)
    run = RUN.fullmatch(part)
    workdir.check_ingredients(settings, folder, part, int(run[1]) if run else 0)
    with JobProgress(0, quiet=True) as progress:
        if run:
            step = _rl_step(settings, corpora, folder, progress, (int(run[1]), int(run[2]), number))
        else:
            tokenizer = preparation.load_tokenizer(settings, corpora, folder / "tokenizer.json")
            mesh = meshes.make_mesh(settings.mesh)
            maker = ingredients.Maker(settings, folder, progress, mesh, tokenizer, corpora)
            step = _supervised_step(maker, part, number)
    text, broken = describe(step)
    return f"{part} step {number}\n{text}", broken


def describe(step: Step) -> tuple[str, bool]:
    """Lines for each quantity and for the first bad rows, and True if a number is not finite."""
    found = {name: _bad_places(value, step.rows) for name, value in step.quantities.items()}
    lines = [f"{name:<{max(map(len, found))}}  {where or 'finite'}" for name, (where, _) in found.items()]
    first = next((name for name, (where, _) in found.items() if where), "")
    if not first:
        return "\n".join([*lines, "not reproduced: all numbers of this step are finite"]), False
    lines.append(f"not finite first: {first}")
    lines += [f"row {step.rows[i]} of {step.split}: {step.texts[i]}" for i in found[first][1][:SHOWN]]
    return "\n".join(lines), True


def _bad_places(value: Any, rows: np.ndarray) -> tuple[str, list[int]]:
    """Places where a quantity is not finite ("" if nowhere), and the numbers of these rows in the batch."""
    if getattr(value, "shape", ())[:1] == rows.shape:
        values = np.asarray(hosts.fetch(value)).reshape(len(rows), -1)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
        named = [f"row {rows[i]}: {next(x for x in values[i] if not np.isfinite(x))}" for i in bad]
        return _shortened(list(dict.fromkeys(named))), bad
    names = [trees.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(value)]
    kinds: Any = {"nan": jnp.isnan, "inf": jnp.isinf}
    counts = hosts.fetch(
        jax.jit(lambda x: [[kind(leaf).sum() for kind in kinds.values()] for leaf in x])(jax.tree.leaves(value))
    )
    parts = [[f"{count} {kind}" for kind, count in zip(kinds, leaf, strict=True) if count] for leaf in counts]
    return _shortened([f"{name or 'value'}: {', '.join(p)}" for name, p in zip(names, parts, strict=True) if p]), []


def _shortened(items: list[str]) -> str:
    more = [f"and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "; ".join([*items[:SHOWN], *more])


def read(path: Path, settings: Settings) -> tuple[str, int]:
    """Part and step of a replay file. Raises ValueError if this job has no such step."""
    content = files.read_json(path)
    part, step = content.get("part"), content.get("step")
    counts = {"sft": settings.sft.num_steps, "reward_model": settings.reward_model.num_steps}
    for iteration, count in enumerate(settings.warp.steps_per_iteration, 1):
        counts |= {f"iteration {iteration} run {run}": count for run in range(1, settings.warp.num_runs + 1)}
    if not isinstance(part, str) or type(step) is not int or not 0 <= step < counts.get(part, 0):
        raise ValueError(
            f"replay: {path}: got part {json.dumps(part)} and step {json.dumps(step)}, want those of this job; give a "
            f"file that this job wrote"
        )
    return part, step


def _rl_step(
    settings: Settings,
    corpora: Mapping[str, Corpus],
    folder: Path,
    progress: JobProgress,
    place: tuple[int, int, int],
) -> Step:
    """Repeat a step of a run. place: iteration, run, step."""
    iteration, number, step = place
    tokenizer, trainers, examiner = preparation.prepare(settings, corpora, folder, progress)
    trainer = trainers[number - 1]
    start = warp.make_job(settings, trainers, examiner, folder, progress).init_params(iteration)
    run = reinforce.make_run(trainer, start, iteration, number)
    directory = folder / f"iteration_{iteration}" / f"run_{number}"
    quantities, rollout = rl_quantities(trainer, run, start, directory, step)
    host = hosts.fetch(rollout)
    texts = tokenizer.decode_answers(host.prompt_ids, host.prompt_mask, host.completion_ids, host.completion_mask)
    both = [f"{prompt[-SHOWN_TEXT:]!r} + {answer[:SHOWN_TEXT]!r}" for prompt, answer in zip(*texts, strict=True)]
    return Step(quantities, "split 'prompts'", host.example_ids, both)


def rl_quantities(
    trainer: reinforce.Trainer, run: reinforce.Run, start: Params, directory: Path, step: int
) -> tuple[dict[str, Any], Rollout]:
    """Quantities that a step of a run computes, in this order, and its completions. start: first weights of the run."""
    step_fn = functools.partial(reinforce.train_step, trainer, run)
    state = loop.state_before(step_fn, lambda: trainer.programs.init(start, run.key), directory, step)
    rollout, rewards = reinforce.collect(trainer, run, state, step)
    total = meshes.put_batch(trainer.mesh, rewards.total)
    trace = trainer.programs.trace(state, run.fixed_params, rollout, total)
    return {
        "weights": state.params,
        "anchor weights": state.anchor_params,
        "optimizer state": state.opt_state,
        "sampler logps": rollout.per_token_logps,
        **{f"reward/{name}": values for name, values in rewards.parts.items()},
        "reward": rewards.total,
        **_by_name(trace),
    }, rollout


def _supervised_step(maker: ingredients.Maker, part: str, step: int) -> Step:
    """Repeat a step of SFT or of the reward model."""
    settings, mesh = maker.settings, maker.mesh
    policy = architecture.policy_config(settings.model, maker.tokenizer.vocab_size)
    group: Any = settings.sft if part == "sft" else settings.reward_model
    task = maker.sft_task(policy) if part == "sft" else maker.reward_model_task(policy, maker.sft(policy))
    optimizer = optimizers.make_optimizer(group, settings.adam)
    programs = supervised.make_programs(mesh, task.loss_fn, task.params, optimizer, task.num_microbatches)
    step_fn = functools.partial(supervised.train_step, programs, task, mesh)
    state = loop.state_before(step_fn, lambda: programs.init(task.params), maker.workdir / part, step)
    batch = task.batch_fn(step)
    trace = programs.trace(state, task.frozen_params, meshes.put_batch(mesh, batch))
    quantities = {"weights": state[0], "optimizer state": state[1], **_by_name(trace)}
    texts = [repr(text[:SHOWN_TEXT]) for text in maker.tokenizer.decode(batch["token_ids"], batch["mask"])]
    return Step(quantities, ingredients.named(ingredients.LEARNED[part]), batch[supervised.ROW], texts)


def _by_name(trace: Any) -> dict[str, Any]:
    return {name.replace("_", " "): value for name, value in trace._asdict().items()}
