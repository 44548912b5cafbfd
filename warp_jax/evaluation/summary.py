"""Main results of a job: gain over SFT, best eta within a KL budget, comparisons at equal KL and at equal reward."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from warp_jax.evaluation import measure, pareto
from warp_jax.evaluation.points import Point
from warp_jax.settings import Settings

COMPARED_KLS = 5  # number of KLs at which two fronts are compared


def as_row(point: Point) -> dict[str, Any]:
    """Convert a point to a row of front.csv."""
    fields = point._asdict()
    evaluation = fields.pop("evaluation")
    return {**fields, **measure.summary(evaluation)}


def summarise(settings: Settings, points: Sequence[Point]) -> dict[str, Any]:
    """Contents of summary.json. points: those of the whole job, SFT first."""
    iterations = range(1, settings.warp.num_iterations + 1)
    sft = points[0]
    (final,) = select(points, "merged", iterations[-1])
    gain = np.asarray(final.evaluation.reward, np.float64) - sft.evaluation.reward
    budget = settings.front.kl_budget
    front = select(points, "liti", iterations[-1]) if budget else []
    allowed = [point for point in front if point.evaluation.sft_kl.mean() <= budget]
    best = max(allowed, key=lambda point: point.evaluation.reward.mean(), default=None)
    return {
        "sft_reward": float(sft.evaluation.reward.mean()),
        "final_reward": float(final.evaluation.reward.mean()),
        "final_gold_reward": _number(final.evaluation.gold_reward.mean()),
        "final_sft_kl": float(final.evaluation.sft_kl.mean()),
        "gain_in_standard_errors": float(gain.mean() / (gain.std(ddof=1) / np.sqrt(len(gain)))),
        "kl_budget": budget,
        "best_eta_under_budget": as_row(best) if best else None,
        "iterations_compared": [
            {"iterations": [i - 1, i], "reward_difference": _compare(settings, points, i)} for i in iterations[1:]
        ],
        "front_against_runs": [
            row
            for i in iterations
            for row in front_against_policies(
                front_members(points, i), select(points, "policy", i), resamples=settings.report.bootstrap_resamples
            )
        ],
    }


def one_line(summary: dict[str, Any]) -> str:
    """Write the main results of `summarise` in one line."""
    gold = f", gold {summary['final_gold_reward']:.3f}" if summary["final_gold_reward"] is not None else ""
    line = (
        f"reward {summary['sft_reward']:.3f} (SFT) -> {summary['final_reward']:.3f} "
        f"({summary['gain_in_standard_errors']:+.1f} standard errors{gold}) "
        f"at {summary['final_sft_kl']:.2f} nats from SFT"
    )
    if summary["kl_budget"]:
        best = summary["best_eta_under_budget"]
        chosen = f"eta {best['eta']:g} with reward {best['reward']:.3f}" if best else "no eta of the front"
        line += f"; best under {summary['kl_budget']:g} nats: {chosen}"
    return line


def _compare(settings: Settings, points: Sequence[Point], iteration: int) -> list[dict[str, float]]:
    """Reward of an iteration's front minus that of the front before, at KLs that both reach (95 % intervals)."""
    kl_a, reward_a = _stacked(front_members(points, iteration - 1))
    kl_b, reward_b = _stacked(front_members(points, iteration))
    options: dict[str, Any] = {"resamples": settings.report.bootstrap_resamples, "seed": settings.seed}
    rows = []
    for kl in pareto.common_kls(kl_a.mean(1), reward_a.mean(1), kl_b.mean(1), reward_b.mean(1), COMPARED_KLS).tolist():
        gained = functools.partial(pareto.reward_gained, at=kl)
        interval = pareto.bootstrap_means(gained, (kl_a, reward_a, kl_b, reward_b), **options)
        rows.append({"sft_kl": kl, **interval._asdict()})
    return rows


def select(points: Sequence[Point], stage: str, iteration: int) -> list[Point]:
    """The points of one stage and iteration."""
    return [p for p in points if (p.stage, p.iteration) == (stage, iteration)]


def front_members(points: Sequence[Point], iteration: int) -> list[Point]:
    """The points of one iteration's front: SFT, then the LITI mixes of SFT and the merged policy."""
    return [points[0], *select(points, "liti", iteration)]


def front_against_policies(
    front: Sequence[Point], policies: Sequence[Point], *, resamples: int
) -> list[dict[str, Any]]:
    """Compare each policy with a front measured on the same prompts; one row per policy.

    reward_above: reward of the front at the policy's KL, minus the policy's reward. kl_saved: 1 - (KL of the front at
    the policy's reward) / (the policy's KL). Both have 95 % bootstrap intervals, and are None where the front does not
    reach that KL or reward. The front is interpolated linearly, which understates a concave front.
    """
    stacked = _stacked(front)
    rows = []
    for point in policies:
        kl, reward = point.evaluation.sft_kl, point.evaluation.reward
        row: dict[str, Any] = {name: getattr(point, name) for name in ("iteration", "run", "step")}
        row.update(sft_kl=float(kl.mean()), reward=float(reward.mean()))
        for name, statistic in (("reward_above", pareto.reward_above), ("kl_saved", pareto.kl_saved)):
            interval = pareto.bootstrap_means(statistic, (*stacked, kl, reward), resamples=resamples, seed=0)
            row.update({f"{name}{end}": _number(v) for end, v in zip(("", "_low", "_high"), interval, strict=True)})
        rows.append(row)
    return rows


def _number(value: Any) -> float | None:
    """Turn nan (no gold reward, or out of a front's reach) into None, because JSON has no nan."""
    return float(value) if np.isfinite(value) else None


def _stacked(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """KL to SFT and reward of K policies on N prompts: [K, N] each."""
    return np.stack([p.evaluation.sft_kl for p in points]), np.stack([p.evaluation.reward for p in points])
