"""Measure what bfloat16 does to log-probabilities, to the KL to SFT, and to a run at a small learning rate.

  python scripts/study_precision.py --config=configs/smollm2_135m.py --workdir=runs/precision --out=precision.json

Part 1: the policy is init + noise. Part 2: the same RL run in each arithmetic; then policy and anchor of the float32
run are scored in all of them. Results and their reading are in docs/results/precision.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import jax
    import jax.numpy as jnp

    from warp_jax import progress as job_progress
    from warp_jax import settings as typed
    from warp_jax import trees, types
    from warp_jax.data import batches
    from warp_jax.evaluation import measure
    from warp_jax.experiment import architecture, preparation
    from warp_jax.models import apply, attention, transformer
    from warp_jax.parallel import meshes
    from warp_jax.training import loop, reinforce, scoring


sys.path.insert(0, "")  # config files import configs from the folder that the program is started in

CONFIG = cli.define_config("config", "Config with a pretrained model.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs; what is finished there is not repeated.")
OUT = flags.DEFINE_string("out", "precision.json", "JSON file for the results.")
NOISE = flags.DEFINE_float("noise", 1e-4, "Standard deviation of the noise on each trained weight, part 1.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 1e-6, "Learning rate of part 2 (the paper's: 1e-6).")
STEPS = flags.DEFINE_integer("steps", 40, "Steps of each run of part 2; 0 = part 1 only.", lower_bound=0)
COMPLETIONS = flags.DEFINE_integer("completions", 32, "Completions that policies are scored on.", lower_bound=2)
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "rounded": "bfloat16"}  # arithmetic -> dtype of the model


@contextlib.contextmanager
def arithmetic(name: str) -> Iterator[None]:
    """For "rounded", programs traced inside round the head's products and the attention scores to bfloat16.

    That is what a TPU does when a bfloat16 product is not asked to come out in float32.
    """
    multiply, plain = transformer._multiply, attention.plain

    def rounded_multiply(x: types.Array, kernel: types.Array, dtype: str) -> types.Array:
        return multiply(x, kernel, dtype).astype(jnp.bfloat16).astype(dtype)

    def rounded_plain(
        query: types.Array, key: types.Array, value: types.Array, mask: types.Array, softcap: float
    ) -> types.Array:
        einsum = jnp.einsum

        def rounded_einsum(*args: Any, **kwargs: Any) -> types.Array:
            return einsum(*args, **kwargs).astype(jnp.bfloat16)

        with mock.patch.object(jnp, "einsum", rounded_einsum):
            return plain(query, key, value, mask, softcap)

    with contextlib.ExitStack() as stack:
        if name == "rounded":
            stack.enter_context(mock.patch.object(transformer, "_multiply", rounded_multiply))
            stack.enter_context(mock.patch.object(attention, "plain", rounded_plain))
        yield


def log_ratios(
    settings: typed.Settings, name: str, policy: types.Params, reference: types.Params, rollout: types.Rollout
) -> tuple[np.ndarray, np.ndarray]:
    """Log-ratio of each token [B, C] and exact KL of each completion [B] between two policies, in an arithmetic."""
    config = dataclasses.replace(architecture.policy_config(settings.model, settings.vocab_size), dtype=DTYPES[name])
    options: Any = {"temperature": settings.sampling.temperature, "chunk": settings.model.logits_chunk}
    score = jax.jit(functools.partial(scoring.per_token_logps, apply.make_apply_fn(config), **options))
    kl = jax.jit(functools.partial(scoring.sequence_kl, apply.make_apply_fn(config), **options))
    with arithmetic(name):
        ratio = score(policy, rollout) - score(reference, rollout)
        return np.asarray(ratio, np.float64), np.asarray(kl(policy, reference, rollout), np.float64)


def compare(
    settings: typed.Settings, policy: types.Params, reference: types.Params, rollout: types.Rollout
) -> dict[str, dict[str, float]]:
    """Log-ratios and KLs in each arithmetic, and the errors against float32 (standard deviations, nats)."""
    mask = np.asarray(rollout.completion_mask)
    found = {name: log_ratios(settings, name, policy, reference, rollout) for name in DTYPES}
    exact = found["float32"][0]
    rows = {}
    for name, (ratio, kl) in found.items():
        error = ratio - exact
        rows[name] = {
            "log_ratio": float(ratio.sum(1).mean()),
            "log_ratio_rms": float(np.sqrt(np.mean(ratio.sum(1) ** 2))),
            "exact_kl": float(kl.mean()),
            "error_per_token": float(error[mask].std()),
            "error_per_completion": float(error.sum(1).std()),
        }
    return rows


def noisy(params: types.Params, deviation: float) -> types.Params:
    """The parameters plus normal noise."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [deviation * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, [x + n for x, n in zip(leaves, noise, strict=True)])


def run(
    settings: typed.Settings, directory: Path, trainer: reinforce.Trainer, init: types.Params
) -> tuple[Any, list[Any]]:
    """Train one run; return its last state and the metrics of each step."""
    states: list[Any] = []
    metrics: list[Any] = []

    def keep(done: int, state: Any) -> None:
        states[:] = [jax.tree.map(jnp.copy, state)] if done == STEPS.value else []

    schedule = loop.Schedule(STEPS.value, directory, STEPS.value + 1, lambda _, values: metrics.append(values), keep)
    reinforce.run_policy(trainer, init, iteration=1, run=1, schedule=schedule)
    return states[0], [m for m in metrics if m]


def main(argv: list[str]) -> None:
    """Run both parts, and write the results as they come."""
    del argv
    results: dict[str, Any] = {"noise": NOISE.value, "learning_rate": LEARNING_RATE.value, "steps": STEPS.value}
    for name in DTYPES:
        with arithmetic(name):
            study(name, results)
        if not STEPS.value:
            break
    print(Path(OUT.value).read_text())


def study(name: str, results: dict[str, Any]) -> None:
    """Both parts in one arithmetic; part 1 and the comparison of policy and anchor only in float32's turn."""
    changes = {
        "rl.learning_rate": LEARNING_RATE.value,
        "model.dtype": DTYPES[name],
        "evaluation.dtype": DTYPES[name],
    }
    settings = typed.from_config(CONFIG.value.to_dict()).replace(changes)
    workdir = files.as_path(WORKDIR.value) / name
    with job_progress.JobProgress(STEPS.value) as progress:
        corpora = preparation.load_corpora(settings)
        _, (trainer, *_), examiner = preparation.prepare(settings, corpora, workdir, progress)
    sft, frozen = examiner.sft_params, examiner.frozen_params
    prompts = meshes.put_batch(trainer.mesh, batches.take(examiner.eval_prompts, np.arange(COMPLETIONS.value)))

    def compared(policy: types.Params, reference: types.Params) -> dict[str, dict[str, float]]:
        policy, reference = trees.join(policy, frozen), trees.join(reference, frozen)
        return compare(settings, policy, reference, trainer.sampler(policy, prompts, jax.random.key(0)))

    if name == "float32":
        results["init_plus_noise"] = compared(noisy(sft, NOISE.value), sft)
        files.write_json(Path(OUT.value), results)
    if not STEPS.value:
        return
    state, metrics = run(settings, workdir / "run", trainer, sft)
    policy = trainer.programs.weights(state.params, sft)
    evaluation = measure.evaluate(examiner, policy)
    means = {key: float(np.mean([step[key] for step in metrics])) for key in metrics[0]}
    held_out = {f"held_out_{key}": value for key, value in measure.summary(evaluation).items() if np.isfinite(value)}
    results[f"run_{name}"] = {**means, **held_out}
    if name == "float32":
        results["policy_and_anchor"] = compared(policy, state.anchor_params)
    files.write_json(Path(OUT.value), results)


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"), example="--config=configs/smollm2_135m.py --workdir=runs/precision")
