"""Side-by-side comparison of two policies on the same prompts: mean grade, win rate, length-controlled win rate.

The grades are those of the paper's Table 1 (arXiv 2406.16768, section 4.5), computed from a judge's two scores.
All results are from the view of `ours`: a positive score or a rate above 1/2 means that `ours` is better.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warp_jax import files
from warp_jax.evaluation import statistics
from warp_jax.evaluation.statistics import Interval
from warp_jax.rewards.text_reward import TextFn

Row = Mapping[str, Any]  # one answer: "prompt", "completion" and any further fields of its line
Margins = tuple[float, ...]  # tie, slightly, better: see grade()

GRADES = {
    "much better": 1.5,
    "better": 1.0,
    "slightly better": 0.5,
    "tie": 0.0,
    "slightly worse": -0.5,
    "worse": -1.0,
    "much worse": -1.5,
}
LENGTHS: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}
# If all scores come from one normal distribution, 14 % of pairs are ties and 26, 31 and 29 % get grade 0.5, 1 and 1.5.
MARGINS_IN_DEVIATIONS: Margins = (0.25, 0.75, 1.5)
RIDGE = 0.1  # L2 penalty: a normal prior with standard deviation 3.2 log-odds on each weight
TOLERANCE = 1e-8  # largest gradient of the mean loss at the minimum
MAX_STEPS = 50  # Newton steps; at most 14 were needed, for 100,000 equal answers


class Comparison(NamedTuple):
    """Results of a comparison. Tuples of two are (ours, theirs); intervals are 95 % bootstrap intervals over prompts.

    score: mean grade, from -1.5 to 1.5. Rates: from 0 to 1. margins: in the judge's unit. grades: number of answers of
    ours with each grade. longer: number of pairs in which ours, or theirs, is the longer answer.
    """

    prompts: int
    answers: int
    margins: Margins
    score: Interval
    win_rate: Interval
    length_controlled_win_rate: Interval
    grades: dict[str, int]
    mean_judge_score: tuple[float, float]
    mean_length: tuple[float, float]
    longer: tuple[int, int]


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read answers from a JSONL file. A ValueError names the line whose prompt or completion is not a text."""
    rows = files.read_jsonl(path)
    for place, row in rows:
        for name in ("prompt", "completion"):
            if not isinstance(row.get(name), str):
                got = type(row[name]).__name__ if name in row else f"fields {sorted(row)}"
                raise ValueError(f'{place}: field "{name}": got {got}, want a text')
    if not rows:
        raise ValueError(f'{path}: got no answers, want one {{"prompt": "...", "completion": "..."}} per line')
    return [row for _, row in rows]


def match(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Row]:
    """Reorder `theirs` so that row i has the prompt of ours[i]; the k-th answers to one prompt form a pair.

    Raises ValueError if a prompt has more answers in one of the two than in the other.
    """
    ours_count, theirs_count = (Counter(row["prompt"] for row in rows) for rows in (ours, theirs))
    for prompt in [*ours_count, *theirs_count]:
        if ours_count[prompt] != theirs_count[prompt]:
            raise ValueError(
                f"prompt {_shown(prompt)}: got {ours_count[prompt]} answers of ours and {theirs_count[prompt]} "
                "of theirs, want the same prompts in both files"
            )
    waiting: dict[str, deque[Row]] = defaultdict(deque)
    for row in theirs:
        waiting[row["prompt"]].append(row)
    return [waiting[row["prompt"]].popleft() for row in ours]


def judge_scores(judge: TextFn, ours: Sequence[Row], theirs: Sequence[Row]) -> np.ndarray:
    """Score both sets of answers: float64 [2, N], ours first, from a single call of the judge."""
    rows = [*ours, *theirs]
    try:
        scores = judge([row["prompt"] for row in rows], [row["completion"] for row in rows], rows)
        values = np.asarray(scores, np.float64)
    except Exception as error:  # the judge is user code
        raise ValueError(f"judge: {type(error).__name__}: {error}") from error
    if values.shape != (len(rows),):
        raise ValueError(f"judge: returned shape {values.shape}, want ({len(rows)},), one number per answer")
    if not np.isfinite(values).all():
        wrong = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"judge: got {values[wrong]} for prompt {_shown(rows[wrong]['prompt'])}, want finite scores")
    return values.reshape(2, -1)


def grade(difference: np.ndarray, margins: Margins) -> np.ndarray:
    """Grade each pair: 0, +-0.5, +-1 or +-1.5, [N], from the score of ours minus the score of theirs, [N].

    The size of a grade is 0 up to margin `tie`, 0.5 up to `slightly`, 1 up to `better`, and 1.5 above.
    """
    return np.sign(difference) * 0.5 * np.searchsorted(margins, np.abs(difference), side="left")


def length_controlled_win_rate(wins: np.ndarray, length_difference: np.ndarray) -> float:
    """Win rate at equal length, predicted by a logistic regression as in AlpacaEval 2 (arXiv 2404.04475).

    The model is log-odds(win) = a + b tanh(d / s), with d the length difference and s its standard deviation; d is not
    centred, so d = 0 means equal length, and the win rate there is 1 / (1 + exp(-a)). a and b minimise the summed
    cross-entropy plus RIDGE/2 (a^2 + b^2). AlpacaEval's third term, the difficulty of each prompt, needs the answers of
    many policies and is left out.

    Args:
      wins: [N], 1 where ours wins, 1/2 for a tie, 0 where theirs wins.
      length_difference: [N], length of ours minus length of theirs.

    Returns:
      A rate from 0 to 1; nan if all differences are equal and not 0: length cannot be separated from quality then.
    """
    import sklearn.linear_model  # noqa: PLC0415  slow to import

    spread = length_difference.std()
    if spread == 0 and length_difference.any():
        return float("nan")
    effect = np.tanh(length_difference / spread) if spread else np.zeros(len(wins))
    features = np.tile(np.column_stack([np.ones(len(wins)), effect]), (2, 1))
    outcomes = np.repeat([1, 0], len(wins))  # each pair twice: as a win with weight w, as a loss with weight 1 - w
    weights = np.concatenate([wins, 1 - wins])
    model = sklearn.linear_model.LogisticRegression(
        C=1 / RIDGE, fit_intercept=False, solver="newton-cholesky", tol=TOLERANCE, max_iter=MAX_STEPS
    )
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # checks are slow
        intercept = model.fit(features, outcomes, weights).coef_[0, 0]
    if model.n_iter_[0] >= MAX_STEPS:
        raise FloatingPointError(f"logistic regression: got no minimum after {MAX_STEPS} Newton steps")
    return float(1 / (1 + np.exp(-intercept)))


def compare(
    judge: TextFn,
    ours: Sequence[Row],
    theirs: Sequence[Row],
    *,
    margins: Margins | None,
    length_unit: str,
    resamples: int,
    seed: int,
) -> Comparison:
    """Compare two sets of answers to the same prompts, in any order; raise ValueError if an input is wrong.

    `margins` (tie, slightly, better) are in the judge's unit; None takes MARGINS_IN_DEVIATIONS times the standard
    deviation of the scores of both policies together. `length_unit` is a name in LENGTHS. The bootstrap draws prompts,
    each with all its answers, and does not change the margins.
    """
    if margins is not None and (len(margins) != 3 or not 0 <= margins[0] < margins[1] < margins[2] < np.inf):
        raise ValueError(f"margins: got {list(margins)}, want three increasing numbers >= 0: tie, slightly, better")
    theirs = match(ours, theirs)
    _, clusters = np.unique([row["prompt"] for row in ours], return_inverse=True)
    drawn = statistics.resample(clusters, resamples, seed)
    if drawn.num_clusters < 2:
        raise ValueError(f"prompts: got {drawn.num_clusters}, want at least 2 different ones, to resample them")
    scores = judge_scores(judge, ours, theirs)
    used = margins or tuple(float(scores.std() * margin) for margin in MARGINS_IN_DEVIATIONS)
    grades = grade(scores[0] - scores[1], used)
    wins = (np.sign(grades) + 1) / 2
    lengths = np.array([[LENGTHS[length_unit](row["completion"]) for row in rows] for rows in (ours, theirs)])
    difference = lengths[0] - lengths[1]
    return Comparison(
        prompts=drawn.num_clusters,
        answers=len(ours),
        margins=used,
        score=statistics.bootstrap(lambda rows: float(grades[rows].mean()), drawn),
        win_rate=statistics.bootstrap(lambda rows: float(wins[rows].mean()), drawn),
        length_controlled_win_rate=statistics.bootstrap(
            lambda rows: length_controlled_win_rate(wins[rows], difference[rows]), drawn
        ),
        grades={name: int((grades == value).sum()) for name, value in GRADES.items()},
        mean_judge_score=(float(scores[0].mean()), float(scores[1].mean())),
        mean_length=(float(lengths[0].mean()), float(lengths[1].mean())),
        longer=(int((difference > 0).sum()), int((difference < 0).sum())),
    )


def _shown(prompt: str, width: int = 60) -> str:
    return repr(prompt if len(prompt) <= width else prompt[:width] + "...")
