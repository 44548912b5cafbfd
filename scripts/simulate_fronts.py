"""Simulate comparisons of fronts whose true difference is zero: how often do the 95 % intervals contain it?

  python scripts/simulate_fronts.py --worlds=1000 --out=docs/results/front_statistics.csv

Each simulated world draws KL and reward of two fronts and of one policy on the same prompts, and compares front b with
front a, and front a with the policy, as the report does. See docs/results/front_statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from warp_jax import progress as job_progress
    from warp_jax.evaluation import columns, fronts, statistics


COUNT = flags.DEFINE_integer("worlds", 1000, "Simulated worlds of each kind.", lower_bound=2)
RESAMPLES = flags.DEFINE_integer("resamples", 1000, "Bootstrap resamples of each comparison.", lower_bound=20)
OUT = flags.DEFINE_string("out", "", "CSV file to write with the table, which is also printed.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the worlds.")

LARGEST_KL = 20.0  # nats, of the last eta
LOOKS = (4.0, 12.0, 16.0)  # nats; coverage is measured at the second, that of simultaneous intervals at all three
POLICIES = (5.0, 9.5, 12.0)  # nats; on the rising part of a front that turns at 10, just below its plateau, and on it


class World(NamedTuple):
    """Kind of world. The true reward rises with KL up to `turn` nats and is constant from there on."""

    etas: int
    turn: float
    prompts: int = 1024  # distinct ones
    samples: int = 1  # completions of each prompt


WORLDS = {
    "13 etas, flat from 10 nats": World(13, 10.0),
    "5 etas, flat from 10 nats": World(5, 10.0),
    "13 etas, linear": World(13, LARGEST_KL),
    "13 etas, flat, 30 prompts x 17": World(13, 10.0, prompts=30, samples=17),
}


class Result(NamedTuple):
    """Results over many worlds of one kind; shares from 0 to 1. bias: in standard errors of one comparison."""

    coverage: float  # of front b minus front a, at the second KL of LOOKS
    simultaneous: float  # of all LOOKS together
    bias: float
    coverage_of_policy: float  # of front a minus the policy, at the policy's KL
    bias_of_policy: float
    not_reached: float


class Saving(NamedTuple):
    """Results for `kl_saved` over many worlds. Coverage and bias (in standard errors) are of worlds that reach it."""

    policy_kl: float  # nats
    coverage: float
    bias: float
    reached: float


def draw(
    world: World, generator: np.random.Generator, policies: Sequence[float] = LOOKS[1:2]
) -> tuple[fronts.Measured, fronts.Measured, fronts.Measured]:
    """Front a, front b, and policies (KL in nats) as good as both. Prompts and completions have random effects."""
    etas = np.linspace(0, 1, world.etas)
    kls = LARGEST_KL * etas**2
    prompts = np.repeat(np.arange(world.prompts), world.samples)
    level, scale = generator.normal(0, 0.7, world.prompts)[prompts], generator.gamma(4, 0.25, world.prompts)[prompts]

    def measure(kl: np.ndarray) -> fronts.Measured:
        shape = (len(kl), len(prompts))
        reward = np.minimum(kl, world.turn)[:, None] * 0.12 + level + generator.normal(0, 0.7, shape)
        return fronts.Measured(kl[:, None] * scale * generator.gamma(4, 0.25, shape), reward)

    return measure(kls), measure(kls), measure(np.array(policies))


def simulate(name: str, *, count: int, resamples: int, seed: int) -> Result:
    """Compare the fronts of `count` worlds of one kind, a name in WORLDS."""
    world = WORLDS[name]
    generator = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(world.prompts), world.samples)
    looks, policies = [], []
    for number in range(count):
        front_a, front_b, policy = draw(world, generator)
        drawn = statistics.resample(clusters, resamples, number)
        looks.append(fronts.compare_fronts(front_a, front_b, LOOKS, drawn))
        policies.append(fronts.compare_with_policies(front_a, policy, drawn)[0].reward_above)
    alone = np.array([look[1].difference for look in looks])
    together = np.array([[single.simultaneous for single in look] for look in looks])
    above = np.array(policies)
    return Result(
        coverage=float(_holds(alone).mean()),
        simultaneous=float(_holds(together).all(1).mean()),
        bias=float(np.nanmean(alone[:, 0]) / np.nanstd(alone[:, 0])),
        coverage_of_policy=float(_holds(above).mean()),
        bias_of_policy=float(np.nanmean(above[:, 0]) / np.nanstd(above[:, 0])),
        not_reached=float(np.isnan(alone[:, 0]).mean()),
    )


def simulate_savings(*, count: int, resamples: int, seed: int) -> list[Saving]:
    """Share of KL that a front saves against POLICIES that are as good: 0, and on the plateau 1 - 10 / 12."""
    world = WORLDS["13 etas, flat from 10 nats"]
    generator = np.random.default_rng(seed)
    saved = []
    for number in range(count):
        front, _, policies = draw(world, generator, POLICIES)
        drawn = statistics.resample(np.arange(world.prompts), resamples, number)
        saved.append([found.kl_saved for found in fronts.compare_with_policies(front, policies, drawn)])
    results = []
    for kl, intervals in zip(POLICIES, np.array(saved).swapaxes(0, 1), strict=True):
        reached = intervals[np.isfinite(intervals[:, 0])] - (1 - min(kl, world.turn) / kl)
        bias = reached[:, 0].mean() / reached[:, 0].std()
        results.append(Saving(kl, float(_holds(reached).mean()), float(bias), len(reached) / count))
    return results


def _holds(intervals: np.ndarray) -> np.ndarray:
    """True where an interval (value, low, high) does not exclude 0, the true difference; also if not reached."""
    return ~((intervals[..., 1] > 0) | (intervals[..., 2] < 0))


def main(argv: list[str]) -> None:
    """Simulate all kinds of worlds, and print one line each; then one line for each of POLICIES."""
    del argv
    rows = []
    with job_progress.JobProgress(len(WORLDS)) as progress:
        progress.start_phase("worlds", len(WORLDS), finished=False)
        for number, name in enumerate(WORLDS, start=1):
            found = simulate(name, count=COUNT.value, resamples=RESAMPLES.value, seed=SEED.value)
            rows.append({"world": name, **{key: f"{value:.3f}" for key, value in found._asdict().items()}})
            progress.on_step(number, {})
    table = columns.to_csv(rows)
    savings = simulate_savings(count=COUNT.value, resamples=RESAMPLES.value, seed=SEED.value)
    lines = [{name: f"{value:.3f}" for name, value in saving._asdict().items()} for saving in savings]
    print(table, columns.to_csv(lines), sep="\n", end="")
    if OUT.value:
        files.write_text(Path(OUT.value), table)


if __name__ == "__main__":
    cli.run(main, required=(), example="--worlds=1000 --out=front_statistics.csv")
