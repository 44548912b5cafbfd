"""Measure the merges of two runs over the weight lambda, by SLERP and by LERP: figures 3c and 8 of the WARP paper.

  python scripts/slerp_weights.py --workdir=runs/quickstart --weights=0,0.25,0.5,0.75,1

lambda = 0 is run 1 of the first iteration, 1 is run 2. It writes WORKDIR/slerp_weights.csv, with the reward, gold
reward and KL to SFT of each merge on the held-out prompts of the workdir, and prints SLERP's reward minus LERP's.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from warp_jax import merging
    from warp_jax.evaluation import columns, measure, statistics
    from warp_jax.experiment import stages
    from warp_jax.storage import checkpoint

if TYPE_CHECKING:  # lazy imports have modules only
    from warp_jax.evaluation.measure import Evaluation

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a job of warp_jax.main whose first iteration has two runs.")
WEIGHTS = flags.DEFINE_list("weights", ["0", "0.25", "0.5", "0.75", "1"], "Values of lambda, from 0 to 1.")


def main(argv: list[str]) -> None:
    """Merge, measure, print and save."""
    del argv
    try:
        weights = cli.numbers(WEIGHTS)
        if not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"--weights: got {','.join(WEIGHTS.value)}, want numbers from 0 to 1")
        job = stages.Workdir(files.as_path(str(WORKDIR.value)))
        paths = [job.path / "iteration_1" / f"run_{run}" / "params" for run in range(1, job.settings.warp.num_runs + 1)]
        if len(paths) != 2 or not all(map(checkpoint.has_params, paths)):
            raise ValueError(f"workdir: {job.path} has {len(paths)} runs in an iteration, want 2, and both finished")
        examiner = job.examiner()
    except (ValueError, OSError) as error:
        cli.fail(error)
    policies = [checkpoint.restore_params(path, examiner.sft_params) for path in paths]

    def evaluate(method: str, given: list[float]) -> Evaluation:
        unit = job.settings.warp.unit
        merged = merging.merge(examiner.sft_params, policies, method, weights=given, unit=unit)
        return measure.evaluate(examiner, merged)

    rows: list[dict[str, Any]] = []
    for weight in weights:
        found = {"slerp": evaluate("slerp", [weight]), "lerp": evaluate("lerp", [1 - weight, weight])}
        rows += [{"method": name, "slerp_weight": weight, **measure.summary(each)} for name, each in found.items()]
        print(f"lambda {weight:<5g} {_line(**found)}", flush=True)
    files.write_text(job.path / "slerp_weights.csv", columns.to_csv(rows))


def _line(slerp: Evaluation, lerp: Evaluation) -> str:
    """Reward and KL of both, and the difference of the rewards on the same prompts, with its standard error."""
    numbers = (
        f"{name} reward {each.reward.mean():.4f} at KL {each.sft_kl.mean():.3f}"
        for name, each in (("slerp", slerp), ("lerp", lerp))
    )
    difference, error = statistics.mean_and_se(slerp.reward - lerp.reward, slerp.clusters)
    return f"{', '.join(numbers)}, difference {difference:+.4f} ± {error:.4f}"


if __name__ == "__main__":
    sys.path.append("")  # a reward may be a file in this folder
    cli.run(main, required=("workdir",), example="--workdir=runs/quickstart")
