"""Measures a policy on held-out prompts: reward, gold reward, KL to SFT, length, diversity."""

import io
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from warp_jax import files, trees
from warp_jax.data import batches
from warp_jax.evaluation import statistics
from warp_jax.parallel import hosts, meshes
from warp_jax.training import sampling
from warp_jax.types import Array, Params, PromptBatch, RewardFn, Rollout


class Evaluation(NamedTuple):
    """One sample for each of N held-out prompts, the same prompts in the same order for every policy (numpy).

    reward, gold_reward: float32 [N], reward units. sft_kl: float32 [N], nats per sequence. length: [N], tokens.
    distinct_2: float [], share of distinct token pairs. completion_ids [N, C], completion_mask [N, C].
    """

    reward: np.ndarray
    gold_reward: np.ndarray
    sft_kl: np.ndarray
    length: np.ndarray
    distinct_2: np.ndarray
    completion_ids: np.ndarray
    completion_mask: np.ndarray


EVALUATION_STREAM = 2**31 - 1  # in random keys; no iteration of training has this number
EvaluateFn = Callable[[Params], Evaluation]
KlFn = Callable[[Params, Params, Params, Rollout], Array]  # trained policy, trained SFT, frozen -> float32 [B], nats
OnEvaluation = Callable[[str, Evaluation, float], None]  # name, result, seconds


class Examiner(NamedTuple):
    """What every policy is measured with and on: two policies get the same prompts and random keys, so that their
    differences are paired.

    reward_fn, gold_fn: rewards of a rollout; gold_fn gives float32 [B]. sft_params, frozen_params: trained leaves of
    SFT, and the other leaves of the model. batch_size: divides the number of prompts.
    """

    mesh: Mesh
    sampler: sampling.Sampler
    kl_to_sft: KlFn
    reward_fn: RewardFn
    gold_fn: Callable[[Rollout], np.ndarray]
    sft_params: Params
    frozen_params: Params
    eval_prompts: PromptBatch
    batch_size: int
    seed: int


def make_kl_to_sft(score_kl: Callable[[Params, Params, Rollout], Array]) -> KlFn:
    """Jit the KL of a policy to SFT, given that of two whole models.

    Both are joined with the frozen weights inside, so XLA sees that frozen layers below the first trained one are the
    same in both.
    """

    @jax.jit
    def kl_to_sft(params: Params, sft_params: Params, frozen_params: Params, rollout: Rollout) -> Array:
        return score_kl(trees.join(params, frozen_params), trees.join(sft_params, frozen_params), rollout)

    return kl_to_sft


def evaluate(examiner: Examiner, params: Params) -> Evaluation:
    """Sample one completion for each held-out prompt and measure it; params: trained leaves of the policy."""
    laid_out = examiner.sampler.lay_out(trees.join(params, examiner.frozen_params))
    count = len(examiner.eval_prompts.example_ids) // examiner.batch_size
    measured = [_evaluate_batch(examiner, params, laid_out, number) for number in range(count)]
    columns = {name: np.concatenate([batch[name] for batch in measured]) for name in measured[0]}
    mask = columns["completion_mask"]
    rows = [ids[keep].tolist() for ids, keep in zip(columns["completion_ids"], mask, strict=True)]
    return Evaluation(length=mask.sum(1), distinct_2=np.array(statistics.distinct_n(rows, 2)), **columns)


def _evaluate_batch(examiner: Examiner, params: Params, laid_out: Params, number: int) -> dict[str, np.ndarray]:
    key = jax.random.fold_in(jax.random.key(examiner.seed), EVALUATION_STREAM)
    rows = np.arange(number * examiner.batch_size, (number + 1) * examiner.batch_size)
    batch = meshes.put_batch(examiner.mesh, batches.take(examiner.eval_prompts, rows))
    rollout = examiner.sampler.generate(laid_out, batch, jax.random.fold_in(key, number))
    measured = {
        "reward": examiner.reward_fn(rollout).total,
        "sft_kl": examiner.kl_to_sft(params, examiner.sft_params, examiner.frozen_params, rollout),
        "completion_ids": rollout.completion_ids,
        "completion_mask": rollout.completion_mask,
    }
    return {**hosts.fetch(measured), "gold_reward": examiner.gold_fn(rollout)}


def summary(evaluation: Evaluation) -> dict[str, float]:
    """Means over the prompts with their standard errors, as the columns of front.csv."""
    row = {}
    for name in ("reward", "gold_reward", "sft_kl"):
        row[name], row[f"{name}_se"] = statistics.mean_and_se(getattr(evaluation, name))
    return {**row, "length": float(evaluation.length.mean()), "distinct_2": float(evaluation.distinct_2)}


class EvaluationStore:
    """Evaluations saved by name, so that none is made twice. on_new is called with each new one."""

    def __init__(self, directory: Path, evaluate: EvaluateFn, on_new: OnEvaluation):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._evaluate = evaluate
        self._on_new = on_new

    def missing(self, names: Iterable[str]) -> list[str]:
        """The names without a saved evaluation, sorted."""
        return [name for name in sorted(names) if not hosts.exists(self._path(name))]

    def get(self, name: str, make_params: Callable[[], Params]) -> Evaluation:
        """The saved evaluation called `name`; if it is missing, evaluate make_params() and save the result."""
        path = self._path(name)
        if not hosts.exists(path):
            started = time.monotonic()
            evaluation = self._evaluate(make_params())
            hosts.on_first_process(lambda: _save(path, evaluation))
            self._on_new(name, evaluation, time.monotonic() - started)
            return evaluation
        return load_evaluation(path)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.npz"


def _save(path: Path, evaluation: Evaluation) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **evaluation._asdict())
    files.write_bytes(path, content.getvalue())


def load_evaluation(path: Path) -> Evaluation:
    """Read a saved evaluation."""
    with np.load(path) as arrays:
        return Evaluation(**arrays)
