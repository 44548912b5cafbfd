"""Two policies side by side on the same prompts: graded score, win rate, and win rate at equal length.

The grades are those of the paper's Table 1 (arXiv 2406.16768, section 4.5); here a judge's two scores give them.
Everything is seen from `ours`: a positive score and a rate above 1/2 speak for it.
"""

import functools
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression

from warp_jax.evaluation import pareto
from warp_jax.evaluation.pareto import Interval
from warp_jax.rewards.reward_functions import TextFn

Row = Mapping[str, Any]  # one answer: "prompt", "completion" and whatever else its file holds
Margins = tuple[float, float, float]

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
# Of pairs drawn from one normal distribution, 14 % are then ties and 26, 31 and 29 % get grades 0.5, 1 and 1.5.
MARGINS_IN_DEVIATIONS: Margins = (0.25, 0.75, 1.5)
RIDGE = 0.1  # a normal prior of standard deviation 3.2 log-odds on each weight
TOLERANCE = 1e-8  # on the gradient of the mean loss
MAX_STEPS = 50  # Newton steps; at most 14 were needed, by 100,000 equal answers


class Comparison(NamedTuple):
    """What is known of two policies. Pairs are (ours, theirs); intervals are 95 % bootstrap intervals over prompts.

    score: mean grade in [-1.5, 1.5]. Rates in [0, 1]. margins: judge units. grades: answers by grade of ours.
    longer: number of pairs in which (ours, theirs) is the longer answer.
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


def parse_answers(text: str, name: str) -> list[dict[str, Any]]:
    """The answers in JSON lines; blank lines are skipped. ValueError names `name` and the line of what is wrong."""
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON strings may hold other line separators
    rows = [_parse_line(line, f"{name} line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f'{name}: got no answers, want one {{"prompt": "...", "completion": "..."}} a line')
    return rows


def match(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Row]:
    """The rows of theirs in the order of ours, by prompt; the k-th answer to a prompt meets the k-th.

    Raises ValueError with the first prompt that is not answered as often by both.
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
    """The judge's scores: float64 [2, N], ours first. It is called once, so that it may not treat the two apart."""
    rows = [*ours, *theirs]
    try:
        scores = judge([row["prompt"] for row in rows], [row["completion"] for row in rows], rows)
        values = np.asarray(scores, np.float64)
    except Exception as error:  # whatever code of the user's raises
        raise ValueError(f"judge: {type(error).__name__}: {error}") from error
    if values.shape != (len(rows),):
        raise ValueError(f"judge: returned shape {values.shape}, want ({len(rows)},), one number a text")
    if not np.isfinite(values).all():
        wrong = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"judge: got {values[wrong]} for prompt {_shown(rows[wrong]['prompt'])}, want finite scores")
    return values.reshape(2, -1)


def check_margins(margins: Sequence[float]) -> Margins:
    """The margins (tie, slightly, better), or ValueError."""
    if len(margins) != 3 or not 0 <= margins[0] < margins[1] < margins[2] < np.inf:
        raise ValueError(f"margins: got {list(margins)}, want three rising numbers from 0 on: tie, slightly, better")
    return margins[0], margins[1], margins[2]


def default_margins(scores: np.ndarray) -> Margins:
    """MARGINS_IN_DEVIATIONS times the standard deviation of all scores of both policies together."""
    tie, slightly, better = (float(scores.std() * margin) for margin in MARGINS_IN_DEVIATIONS)
    return tie, slightly, better


def grade(difference: np.ndarray, margins: Margins) -> np.ndarray:
    """Grades of ours, [N] of {0, +-0.5, +-1, +-1.5}, for its scores minus theirs [N].

    |difference| <= tie is a tie, <= slightly is 0.5, <= better is 1, above that is 1.5.
    """
    return np.sign(difference) * 0.5 * np.searchsorted(margins, np.abs(difference), side="left")


def length_controlled_win_rate(wins: np.ndarray, length_difference: np.ndarray) -> float:
    """The win rate that a logistic regression expects at equal length. wins [N] of {0, 1/2, 1}, 1/2 for a tie.

    As in AlpacaEval 2 (arXiv 2404.04475):  log-odds(win) = a + b tanh(d / s),  d = length of ours minus theirs,
    s = standard deviation of d, not centred, so that d = 0 is equal length;  result = 1 / (1 + exp(-a)).
    a and b minimise the cross-entropy plus RIDGE/2 (a^2 + b^2). AlpacaEval's further term, the difficulty of each
    prompt, is learned from many policies and left out.
    nan if all d are equal and not 0: then length and quality cannot be told apart.
    """
    spread = length_difference.std()
    if spread == 0 and length_difference.any():
        return float("nan")
    effect = np.tanh(length_difference / spread) if spread else np.zeros(len(wins))
    features = np.tile(np.column_stack([np.ones(len(wins)), effect]), (2, 1))  # each pair as a win and as a loss,
    outcomes, weights = np.repeat([1, 0], len(wins)), np.concatenate([wins, 1 - wins])  # weighted: a tie is 1/2 each
    model = LogisticRegression(
        C=1 / RIDGE, fit_intercept=False, solver="newton-cholesky", tol=TOLERANCE, max_iter=MAX_STEPS
    )
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # they cost more than the fit
        intercept = model.fit(features, outcomes, weights).coef_[0, 0]
    if model.n_iter_[0] >= MAX_STEPS:
        raise FloatingPointError(f"logistic regression: got no minimum after {MAX_STEPS} Newton steps")
    return float(1 / (1 + np.exp(-intercept)))


def compare(
    judge: TextFn,
    ours: Sequence[Row],
    theirs: Sequence[Row],
    *,
    margins: Sequence[float] | None,
    length_unit: str,
    resamples: int,
    seed: int,
) -> Comparison:
    """Compare two sets of answers to the same prompts, in any order. margins None: `default_margins`.

    The bootstrap draws prompts, each with all its answers; margins stay as they are. ValueError for bad input.
    """
    given = None if margins is None else check_margins(margins)
    theirs = match(ours, theirs)
    members = _members([row["prompt"] for row in ours])
    if len(members) < 2:
        raise ValueError(f"prompts: got {len(members)}, want at least 2: the intervals are over prompts")
    scores = judge_scores(judge, ours, theirs)
    used = given or default_margins(scores)
    grades = grade(scores[0] - scores[1], used)
    wins = (np.sign(grades) + 1) / 2
    lengths = np.array([[LENGTHS[length_unit](row["completion"]) for row in rows] for rows in (ours, theirs)])
    difference = lengths[0] - lengths[1]
    interval = functools.partial(_interval, members=members, resamples=resamples, seed=seed)
    return Comparison(
        prompts=len(members),
        answers=len(ours),
        margins=used,
        score=interval(lambda rows: float(grades[rows].mean())),
        win_rate=interval(lambda rows: float(wins[rows].mean())),
        length_controlled_win_rate=interval(lambda rows: length_controlled_win_rate(wins[rows], difference[rows])),
        grades={name: int((grades == value).sum()) for name, value in GRADES.items()},
        mean_judge_score=(float(scores[0].mean()), float(scores[1].mean())),
        mean_length=(float(lengths[0].mean()), float(lengths[1].mean())),
        longer=(int((difference > 0).sum()), int((difference < 0).sum())),
    )


def _interval(
    statistic: Callable[[np.ndarray], float], *, members: Sequence[np.ndarray], resamples: int, seed: int
) -> Interval:
    """The bootstrap interval of statistic(rows) when whole prompts are drawn; members[prompt] are its rows."""
    return pareto.bootstrap(
        lambda drawn: statistic(np.concatenate([members[prompt] for prompt in drawn])),
        len(members),
        resamples=resamples,
        seed=seed,
    )


def _members(prompts: Sequence[str]) -> list[np.ndarray]:
    """The rows of each distinct prompt."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows[prompt].append(row)
    return [np.array(found) for found in rows.values()]


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON: {getattr(error, 'msg', error)}; want one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: got {type(row).__name__}, want an object {{"prompt": ..., "completion": ...}}')
    for name in ("prompt", "completion"):
        if not isinstance(row.get(name), str):
            got = type(row[name]).__name__ if name in row else f"fields {sorted(row)}"
            raise ValueError(f'{where}: field "{name}": got {got}, want a text')
    return row


def _shown(prompt: str, width: int = 60) -> str:
    return repr(prompt if len(prompt) <= width else prompt[:width] + "...")
