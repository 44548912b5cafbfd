"""Main results of a job: gain over SFT, best eta within a KL budget, comparisons at equal KL and at equal reward."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from warp_jax.evaluation import columns, fronts, statistics
from warp_jax.evaluation.fronts import Measured
from warp_jax.evaluation.points import Point
from warp_jax.settings import Settings

COMPARED_KLS = 5  # number of KLs at which two fronts are compared
NO_SPREAD = 1e-6  # a standard error below this share of the mean comes from the rounding of float32 rewards


def summarise(settings: Settings, points: Sequence[Point]) -> dict[str, Any]:
    """Contents of summary.json. points: those of the whole job, SFT first."""
    iterations = range(1, settings.warp.num_iterations + 1)
    sft = points[0]
    (final,) = select(points, "merged", iterations[-1])
    clusters = sft.evaluation.clusters
    gain = np.asarray(final.evaluation.reward, np.float64) - sft.evaluation.reward
    mean_gain, gain_se = statistics.mean_and_se(gain, clusters)
    resamples = statistics.resample(clusters, settings.report.bootstrap_resamples, settings.seed)
    budget = settings.front.kl_budget
    best = best_etas(settings, front_members(points, iterations[-1])[1:], [budget])[0] if budget else None
    return {
        "held_out_completions": len(clusters),
        "distinct_prompts": resamples.num_clusters,
        "sft_reward": float(sft.evaluation.reward.mean()),
        "final_reward": float(final.evaluation.reward.mean()),
        "final_gold_reward": _number(final.evaluation.gold_reward.mean()),
        "final_sft_kl": float(final.evaluation.sft_kl.mean()),
        "gain_in_standard_errors": mean_gain / gain_se if gain_se > NO_SPREAD * abs(mean_gain) else None,
        "runs": _runs(settings, points),
        "kl_budget": budget,
        "best_eta_under_budget": best,
        "gold_gap_areas": [_gold_gap_area(points, i, resamples) for i in iterations],
        "iterations_compared": [
            {"iterations": [i - 1, i], "reward_difference": _compare(points, i, resamples)} for i in iterations[1:]
        ],
        "front_against_runs": [
            row
            for i in iterations
            for row in front_against_policies(front_members(points, i), select(points, "policy", i), resamples)
        ],
    }


def one_line(summary: dict[str, Any]) -> str:
    """Write the main results of `summarise` in one line."""
    gold = f", gold {summary['final_gold_reward']:.3f}" if summary["final_gold_reward"] is not None else ""
    errors = summary["gain_in_standard_errors"]
    gain = "no spread" if errors is None else f"{errors:+.1f} standard errors"
    line = (
        f"reward {summary['sft_reward']:.3f} (SFT) -> {summary['final_reward']:.3f} ({gain}{gold}) "
        f"at {summary['final_sft_kl']:.2f} nats from SFT"
    )
    if summary["distinct_prompts"] < summary["held_out_completions"]:
        line += f"; {summary['held_out_completions']} completions of {summary['distinct_prompts']} distinct prompts"
    if summary["kl_budget"]:
        best = summary["best_eta_under_budget"]
        chosen = "no eta of the front"
        if best:
            chosen = f"eta {best['eta']:g} with reward {best['reward']:.3f} at {best['sft_kl']:.2f} nats"
            chosen += f" (within the budget with probability {best['probability_within_budget']:.2f})"
        line += f"; best under {summary['kl_budget']:g} nats: {chosen}"
    return line


def _runs(settings: Settings, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Steps of each run, the last of which is evaluated, and its entry in warp.runs."""
    changes = dict(enumerate(settings.warp.runs, 1))
    steps = {(point.iteration, point.run): point.step for point in points if point.stage == "policy"}
    return [
        {"iteration": iteration, "run": run, "steps": number, "changes": changes.get(run, {})}
        for (iteration, run), number in steps.items()
    ]


def best_etas(settings: Settings, front: Sequence[Point], budgets: Sequence[float]) -> list[dict[str, float] | None]:
    """For each KL budget (nats), the eta of a front with the highest reward: chosen on half of the prompts, measured on
    the rest; None if no eta is within the budget.
    """
    choices = fronts.choose_under_budgets(
        _measured(front),
        front[0].evaluation.clusters,
        budgets,
        resamples=settings.report.bootstrap_resamples,
        seed=settings.seed,
    )
    return [
        choice
        and {
            "eta": front[choice.point].eta,
            "reward": choice.reward,
            "sft_kl": choice.kl,
            "probability_within_budget": choice.probability,
        }
        for choice in choices
    ]


def _compare(points: Sequence[Point], iteration: int, resamples: statistics.Resamples) -> list[dict[str, float | None]]:
    """Reward of an iteration's front minus that of the front before, at KLs that both reach (95 % intervals)."""
    before, after = (_measured(front_members(points, i)) for i in (iteration - 1, iteration))
    at = fronts.common_kls(before.kl.mean(1), after.kl.mean(1), COMPARED_KLS)
    rows = []
    for look in fronts.compare_fronts(before, after, at.tolist(), resamples):
        bounds = {"simultaneous_low": look.simultaneous.low, "simultaneous_high": look.simultaneous.high}
        numbers = {**look.difference._asdict(), **bounds}
        rows.append({"sft_kl": look.kl, **{name: _number(value) for name, value in numbers.items()}})
    return rows


def _gold_gap_area(points: Sequence[Point], iteration: int, resamples: statistics.Resamples) -> dict[str, Any]:
    """Area between gold reward and reward along an iteration's front: the gold gap, integrated over KL.

    In SFT's standard deviations times nats, by trapezoids from SFT to the last eta (95 % interval).
    """
    front = [point.evaluation for point in front_members(points, iteration)]
    gaps = resamples.means(np.stack([columns.gold_gap(evaluation, front[0]) for evaluation in front]))
    areas = np.trapezoid(gaps, resamples.means(np.stack([evaluation.sft_kl for evaluation in front])), axis=0)
    (area,) = statistics.intervals(areas[None], resamples.num_clusters)
    return {"iteration": iteration, **{name: _number(value) for name, value in area._asdict().items()}}


def select(points: Sequence[Point], stage: str, iteration: int) -> list[Point]:
    """The points of one stage and iteration."""
    return [p for p in points if (p.stage, p.iteration) == (stage, iteration)]


def front_members(points: Sequence[Point], iteration: int) -> list[Point]:
    """The points of one iteration's front, by eta: SFT, then the LITI mixes of SFT and the merged policy."""
    return [points[0], *sorted(select(points, "liti", iteration), key=lambda point: point.eta)]


def front_against_policies(
    front: Sequence[Point], policies: Sequence[Point], resamples: statistics.Resamples
) -> list[dict[str, Any]]:
    """Compare each policy with a front measured on the same prompts; one row per policy.

    reward_above: reward of the front at the policy's KL, minus the policy's reward. kl_saved: 1 - (KL of the front at
    the policy's reward) / (the policy's KL). Both have 95 % bootstrap intervals, and are None where the front does not
    reach that KL or reward. The front is interpolated linearly, which understates a concave front.
    """
    if not policies:
        return []
    found = fronts.compare_with_policies(_measured(front), _measured(policies), resamples)
    rows = []
    for point, against in zip(policies, found, strict=True):
        kl, reward = point.evaluation.sft_kl, point.evaluation.reward
        row: dict[str, Any] = {name: getattr(point, name) for name in ("iteration", "run", "step")}
        row.update(sft_kl=float(kl.mean()), reward=float(reward.mean()))
        for name, interval in against._asdict().items():
            row.update({f"{name}{end}": _number(v) for end, v in zip(("", "_low", "_high"), interval, strict=True)})
        rows.append(row)
    return rows


def _number(value: Any) -> float | None:
    """Turn nan (no gold reward, or not reached by a front) into None, because JSON has no nan."""
    return float(value) if np.isfinite(value) else None


def _measured(points: Sequence[Point]) -> Measured:
    kls, rewards = zip(*((point.evaluation.sft_kl, point.evaluation.reward) for point in points), strict=True)
    return Measured(np.stack(kls), np.stack(rewards))
