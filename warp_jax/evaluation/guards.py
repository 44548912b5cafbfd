"""Guards of a run: compare it with the limits of config.health, and warn or end it."""

import collections
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from warp_jax.evaluation import measure
from warp_jax.settings.groups import Health
from warp_jax.types import GuardError

WINDOW = 10  # steps whose mean is compared with a limit
STEP_METRICS = ("anchor_kl", "length", "truncated")
Findings = Iterator[tuple[str, str]]  # name of the setting that holds the limit, what exceeds it


def of_steps(health: Health, means: Mapping[str, float], sft_length: float) -> Findings:
    """Findings in the means of STEP_METRICS. sft_length: mean length of SFT's completions, tokens."""
    if 0 < health.max_kl < means["anchor_kl"]:
        yield "max_kl", f"KL to the anchor is {means['anchor_kl']:.4g} nats"
    ratio = means["length"] / sft_length
    if 0 < health.max_length_ratio < max(ratio, 1 / ratio):
        yield "max_length_ratio", f"completions have {ratio:.3g} times the length of SFT's"
    if 0 < health.max_truncated < means["truncated"]:
        yield "max_truncated", f"the share of truncated completions is {means['truncated']:.3g}"


def of_evaluations(health: Health, rows: Mapping[int, Mapping[str, float]], step: int) -> Findings:
    """Findings in the evaluation of a step. rows: summaries of a run's evaluations by step; that of step 0 is SFT's."""
    row = rows[step]
    if 0 < health.max_kl < row["sft_kl"]:
        yield "max_kl", f"KL to SFT is {row['sft_kl']:.4g} nats"
    share = row["distinct_2"] / max(rows[0]["distinct_2"], 1e-9)
    if share < health.min_distinct_2:
        yield "min_distinct_2", f"distinct_2 is {share:.3g} times SFT's"
    for before in (number for number in sorted(rows) if number < step and health.max_gold_drop):
        rise = row["reward"] - rows[before]["reward"]
        drop = rows[before]["gold_reward"] - row["gold_reward"]
        errors = [math.hypot(row[name], rows[before][name]) for name in ("reward_se", "gold_reward_se")]
        if rise > health.max_gold_drop * errors[0] and drop > health.max_gold_drop * errors[1]:
            text = f"since step {before} the reward rose by {rise:.3g} and the gold reward fell by {drop:.3g}"
            yield "max_gold_drop", f"{text} = {drop / max(errors[1], 1e-9):.3g} standard errors"
            return


class Guards:
    """Guards of one run. The first excess of each limit prints a warning or ends the run, in all processes alike."""

    def __init__(self, health: Health, run: str, sft: measure.Evaluation, warn: Callable[[str], None]):
        self._health, self._run, self._warn = health, run, warn
        self._settings = health.model_dump()
        self._rows = {0: measure.summary(sft)}
        self._recent: collections.deque[Mapping[str, float]] = collections.deque(maxlen=WINDOW)
        self._told: set[str] = set()
        self._end = ""

    def on_step(self, done: int, values: Mapping[str, float]) -> None:
        """Check the metrics of a step; values: empty for steps of an earlier process."""
        if values:
            self._recent.append(values)
        if len(self._recent) == WINDOW:
            means = {name: float(np.mean([row[name] for row in self._recent])) for name in STEP_METRICS}
            self._tell(done, of_steps(self._health, means, self._rows[0]["length"]))

    def know(self, step: int, evaluation: measure.Evaluation) -> None:
        """Note an evaluation that later ones are compared with."""
        self._rows[step] = measure.summary(evaluation)

    def on_evaluation(self, step: int, evaluation: measure.Evaluation) -> None:
        """Check the evaluation after `step` steps."""
        self.know(step, evaluation)
        self._tell(step, of_evaluations(self._health, self._rows, step))

    def stop(self) -> None:
        """Raise GuardError if a finding ends the run."""
        if self._end:
            raise GuardError(self._end)

    def _tell(self, step: int, findings: Findings) -> None:
        for name, text in findings:
            limit = f"config.health.{name} = {self._settings[name]:g}"
            line = f"{self._run} step {step}: {text}, limit {limit}"
            if self._settings["action"] == "stop":
                self._end = self._end or f"{line}; the state is saved: change this limit or its action, and start again"
            elif name not in self._told:
                self._warn(f"warning: {line}")
            self._told.add(name)
