"""Rows of front.csv: the measures of each evaluated policy, computed from its saved evaluation.

Axis letters: N completions, C tokens of a completion.
"""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from warp_jax.evaluation import measure, statistics
from warp_jax.evaluation.measure import Evaluation
from warp_jax.evaluation.points import Point
from warp_jax.settings import groups


def as_rows(points: Sequence[Point], settings: groups.Evaluation) -> list[dict[str, Any]]:
    """Convert points, SFT first, to rows of front.csv."""
    sft = points[0].evaluation
    return [{**summary_row(point), **_more(point.evaluation, sft, settings)} for point in points]


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as comma-separated text with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summary_row(point: Point) -> dict[str, Any]:
    """The first columns of a row: the fields of the point, and `measure.summary` of its evaluation."""
    fields = point._asdict()
    evaluation = fields.pop("evaluation")
    return {**fields, **measure.summary(evaluation)}


def _more(evaluation: Evaluation, sft: Evaluation, settings: groups.Evaluation) -> dict[str, float]:
    """The columns after those of `measure.summary`. A measure that the settings leave out has no column."""
    clusters, row = evaluation.clusters, {}
    completions = list(zip(evaluation.completion_ids, evaluation.completion_mask, strict=True))
    token_rows = [ids[mask].tolist() for ids, mask in completions]
    for n in (1, 3):
        row[f"distinct_{n}"] = statistics.distinct_n(token_rows, n)
    with_error = {"gold_gap": statistics.mean_and_se(gold_gap(evaluation, sft), clusters)}
    if settings.samples_per_prompt > 1:
        with_error["similarity"] = similarity(evaluation)
    if settings.pass_threshold is not None:
        passed = judged(evaluation) >= settings.pass_threshold
        for k in range(1, settings.samples_per_prompt + 1):
            with_error[f"pass_at_{k}"] = pass_at_k(passed, clusters, k)
    if len(evaluation.text_nats):
        with_error["text_loss"] = statistics.ratio_and_se(evaluation.text_nats, evaluation.text_tokens)
    for name, (value, error) in with_error.items():
        row.update({name: value, f"{name}_se": error})
    return row


def judged(evaluation: Evaluation) -> np.ndarray:
    """The rewards that decide if a completion passes [N]: gold rewards, or rewards if the config has no gold."""
    return evaluation.reward if np.isnan(evaluation.gold_reward).all() else evaluation.gold_reward


def pass_at_k(passed: np.ndarray, clusters: np.ndarray, k: int) -> tuple[float, float]:
    """Probability that at least one of k completions of a prompt passes, and its standard error over prompts.

    1 - C(n - c, k) / C(n, k) if c of the n >= k completions of a prompt pass; it is unbiased (Chen et al. 2021, arXiv
    2107.03374, Eq. 1). Prompts count as often as they have completions, as in all other means.

    Args:
        passed: bool [N].
        clusters: int [N], equal for completions of equal prompts.
        k: 1 or more.
    """
    numbers = np.unique(clusters, return_inverse=True)[1]
    counts, passes = (np.bincount(numbers, weights).astype(int).tolist() for weights in (None, passed))
    found = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in zip(counts, passes, strict=True)]
    return statistics.mean_and_se(np.array(found)[numbers], clusters)


def similarity(evaluation: Evaluation) -> tuple[float, float]:
    """Mean similarity of two completions of one prompt, in [0, 1], and its standard error over prompts.

    The token F1 of all pairs: 2 * tokens in common / tokens of both. A token that both have m times counts m times; the
    order of tokens does not count. Each prompt must have at least 2 completions.
    """
    found = np.zeros(len(evaluation.clusters))
    for cluster in np.unique(evaluation.clusters):
        rows = np.flatnonzero(evaluation.clusters == cluster)
        ids, mask = evaluation.completion_ids[rows], evaluation.completion_mask[rows]
        tokens, numbers = np.unique(ids[mask], return_inverse=True)
        counts = np.zeros((len(rows), len(tokens)), int)
        np.add.at(counts, (np.nonzero(mask)[0], numbers), 1)
        lengths = counts.sum(1)
        pairs = [
            2 * np.minimum(counts[i], counts[i + 1 :]).sum(1) / (lengths[i] + lengths[i + 1 :])
            for i in range(len(rows) - 1)
        ]
        found[rows] = np.concatenate(pairs).mean()
    return statistics.mean_and_se(found, evaluation.clusters)


def gold_gap(evaluation: Evaluation, sft: Evaluation) -> np.ndarray:
    """Gain in gold reward minus gain in reward, each against SFT's completion and in SFT's standard deviations: [N].

    Below 0, the policy has gained more of the reward it was trained on than of the gold reward. nan without a gold
    reward, or if all completions of SFT have the same reward.
    """
    gains = []
    for name in ("gold_reward", "reward"):
        before = np.asarray(getattr(sft, name), np.float64)
        spread = before.std(ddof=1) if np.ptp(before) > 0 else math.nan
        gains.append((getattr(evaluation, name) - before) / spread)
    return gains[0] - gains[1]
