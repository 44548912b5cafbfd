"""Measure best-of-N of SFT on the held-out prompts of a workdir: its reward and its KL to SFT, for each N.

  warp-jax best-of-n --workdir=runs/quickstart --n=2,4,8,16 --samples=128

Best-of-N needs no training, but N samples per answer: the strongest simple baseline at low KL (BOND, arXiv 2407.14622).
It writes WORKDIR/best_of_n/front.csv, with the bound log N - (N - 1) / N of each KL; warp-jax compare shows it beside
the front. A step of that file is an N. See docs/evaluation.md.
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    import jax.numpy as jnp
    from rich import console

    from warp_jax.evaluation import best_of_n, columns, measure, points
    from warp_jax.experiment import stages
    from warp_jax.experiment import workdir as workdirs

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a warp-jax run that has evaluated SFT.")
N = flags.DEFINE_list("n", ["2", "4", "8", "16"], "Values of N, separated by commas; N = 1, which is SFT, is added.")
SAMPLES = flags.DEFINE_integer(
    "samples", 128, "Completions of each prompt; at least 8 times the largest N keeps the bias of the KL small.", 2
)


def main(argv: list[str]) -> None:
    """Sample, measure, print and save."""
    del argv
    try:
        numbers = cli.numbers(N)
        if any(number % 1 or not 1 <= number <= SAMPLES.value for number in numbers):
            raise ValueError(f"--n: got {','.join(N.value)}, want whole numbers from 1 to --samples = {SAMPLES.value}")
        workdir = files.as_path(str(WORKDIR.value))
        examiner = open_examiner(workdir)
    except (ValueError, OSError) as error:
        cli.fail(error)
    samples_per_prompt = workdirs.read_settings(workdir).evaluation.samples_per_prompt
    started, notes = time.monotonic(), console.Console(stderr=True)

    def on_round(done: int, rounds: int) -> None:
        left = (time.monotonic() - started) / done * (rounds - done) / 60
        notes.print(f"{done} of {rounds} evaluations of SFT, about {left:.1f} min left", highlight=False)

    samples = best_of_n.draw(examiner, samples_per_prompt, SAMPLES.value, on_round)
    found = [
        points.Point("best_of_n", 0, 0, float("nan"), n, best_of_n.expected(samples, n, samples_per_prompt))
        for n in sorted({1, *map(int, numbers)})
    ]
    rows = write(workdir / "best_of_n", found)
    for row in rows:
        kl = f"KL {row['sft_kl']:.4f} ± {row['sft_kl_se']:.4f} (bound {row['kl_bound']:.4f})"
        reward = f"reward {row['reward']:.4f} ± {row['reward_se']:.4f}"
        gold = f"gold {row['gold_reward']:.4f} ± {row['gold_reward_se']:.4f}"
        print(f"N {row['step']:4}  {kl}  {reward}  {gold}")


def open_examiner(workdir: Path) -> measure.Examiner:
    """Make the examiner of a workdir's job, without the KL to SFT. Raises ValueError if something is missing."""
    job = stages.Workdir(workdir)
    if not (workdir / "evaluations" / "sft.npz").is_file():
        raise ValueError(f"workdir: {workdir} has no evaluation of SFT yet; start warp-jax run first")
    examiner = job.examiner()
    no_kl = jnp.zeros(examiner.batch_size)  # of SFT to itself
    return examiner._replace(texts=None, kl_to_sft=lambda *args: no_kl)


def write(folder: Path, found: list[points.Point]) -> list[dict[str, float]]:
    """Write front.csv and the evaluations, as those of a workdir; return the rows."""
    rows = []
    for point in found:
        name = points.evaluation_name(*point[:5])
        measure.save_evaluation(folder / "evaluations" / f"{name}.npz", point.evaluation)
        rows.append({**columns.summary_row(point), "kl_bound": best_of_n.kl_bound(point.step)})
    files.write_text(folder / "front.csv", columns.to_csv(rows))
    return rows


def start() -> None:
    """Parse the flags and run."""
    cli.run(main, required=("workdir",), example="--workdir=runs/quickstart --n=2,4,8")
