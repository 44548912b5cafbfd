"""Rows that a reward cannot judge are refused before anything is trained."""

import json
import sys
import time
import types

import pytest

from tests.settings_of import settings_of
from warp_jax.data.corpus import Corpus
from warp_jax.experiment import preparation
from warp_jax.rewards import row_checks
from warp_jax.types import RewardError

MATH = "warp_jax.rewards.math_answers:score"
ROWS = [{"text": f"what is {i} and 7?", "answer": str(i + 7)} for i in range(300)]


def _load(tmp_path, rows, **changes):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"data.reward_fraction": 0.01, "data.gold_fraction": 0.01, "data.prompts_fraction": 0.5}
    rewards = {"rewards": {"right": {"source": "length", "weight": 1.0}}, "gold.source": ""}
    return preparation.load_corpora(
        settings_of({**sizes, **rewards, "data.source": str(source), "data.label_field": "", **changes})
    )


@pytest.fixture
def number_in(tmp_path):
    """Number of a row of each split."""
    splits = _load(tmp_path, ROWS)
    return {name: int(split.rows[0]["text"].split()[2]) for name, split in splits.items() if split.rows}


@pytest.mark.parametrize("value", [[], ["8"], None, float("nan"), "", " ", "####", "$", True, {}], ids=repr)
@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({"rewards": {"right": {"source": MATH, "weight": 1.0}}}, "prompts"),
        ({"rewards": {"right": {"source": MATH, "weight": 1.0}}}, "eval"),
        ({"gold.source": MATH}, "eval"),
    ],
    ids=["reward", "reward in evaluation", "gold"],
)
def test_a_row_without_right_answer_is_refused(tmp_path, number_in, value, changes, split):
    """Fails when an answer that nothing can equal scores 0 for ever or ends the run in its middle, in either split."""
    bad = number_in[split]
    rows = [{**row, "answer": value} if i == bad else row for i, row in enumerate(ROWS)]
    with pytest.raises(ValueError, match=rf"rows\.jsonl line {bad + 1}: warp_jax\.rewards\.math_answers") as error:
        _load(tmp_path, rows, **changes)
    assert "answer" in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_that_are_not_judged_are_not_checked(tmp_path, number_in):
    """Fails when a row that no reward reads is refused."""
    rows = [{**row, "answer": None} if i == number_in["prompts"] else row for i, row in enumerate(ROWS)]
    _load(tmp_path, rows)
    _load(tmp_path, rows, **{"gold.source": MATH})
    weights = {"right": {"source": "length", "weight": 1.0}, "unused": {"source": MATH, "weight": 0.0}}
    _load(tmp_path, rows, rewards=weights)


def _fail(error):
    raise error


CHECKS = {
    "error": (lambda row: row["grade"], r"\.check_row raised KeyError: 'grade' \(.* line \d+\)$"),
    "exit": (lambda row: row or sys.exit(0), r"\.check_row raised SystemExit: 0 \("),
    "interrupt": (lambda row: row or _fail(KeyboardInterrupt()), r"\.check_row raised KeyboardInterrupt \("),
    "refusal": (lambda row: row or _fail(ValueError("no\ngrade")), r"\.check_row: no grade$"),
    "hangs": (lambda row: row or time.sleep(60), r"\.check_row: no result after 0\.2 seconds; .* raise its timeout$"),
}


@pytest.fixture
def judge(monkeypatch):
    """A user's module that judges every row as right; `a_judge` accepts every row too."""
    modules = {name: types.ModuleType(name) for name in ("a_judge", "judge")}
    for name, module in modules.items():
        module.score = lambda prompts, completions, rows: [1.0] * len(rows)
        module.check_row = lambda row: None
        monkeypatch.setitem(sys.modules, name, module)
    return modules["judge"]


@pytest.mark.parametrize("kind", CHECKS)
def test_any_failure_of_a_check_names_the_row_and_the_function(judge, tmp_path, kind):
    """Fails when the check of a user's module ends in a traceback, ends the job or hangs it, when only the first
    module has its check called, or when the folder of a model is imported.
    """
    judge.check_row, message = CHECKS[kind]
    split = Corpus(["a", "b"], [0, 0], [{"grade": 1}, {}], ["a.csv line 2", "a.csv line 3"])
    (tmp_path / "a:b").mkdir()
    limit = 0.2 if kind == "hangs" else 60.0
    limits = {"a_judge:score": 60.0, "judge:score": limit, "length": 60.0, str(tmp_path / "a:b"): 60.0}
    row_checks.check(limits, Corpus._make(column[:1] for column in split))
    with pytest.raises(RewardError, match=rf"^a\.csv line 3: judge{message}"):
        row_checks.check(limits, split)


def test_a_module_that_cannot_be_loaded_is_one_line():
    """Fails when the checks of an export import a reward function that is missing by now, with a traceback."""
    with pytest.raises(RewardError, match="cannot load 'no_such_module:score': ModuleNotFoundError"):
        row_checks.check({"no_such_module:score": 1.0}, Corpus([], [], [], []))


def test_a_check_cannot_change_the_rows(judge):
    """Fails when check_row gets the row itself, or a copy that shares its nested values."""
    judge.check_row = lambda row: row["turns"].append(row.pop("text"))
    split = Corpus(["a"], [0], [{"text": "a", "turns": ["b"]}], ["a.csv line 2"])
    row_checks.check({"judge:score": 5.0}, split)
    assert split.rows == [{"text": "a", "turns": ["b"]}]
