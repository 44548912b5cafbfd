"""Rows that a reward cannot judge are refused before anything is trained."""

import json
import sys
import types

import pytest

from tests.settings_of import settings_of
from warp_jax.data.corpus import Corpus
from warp_jax.experiment import preparation
from warp_jax.rewards import row_checks

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


def test_any_error_of_a_check_names_the_row(monkeypatch, tmp_path):
    """Fails when the check of a user's module ends in a traceback or its own exit code, only the first module has its
    check called, or a model's folder is imported."""
    module = types.ModuleType("judge")
    module.check_row = lambda row: row["grade"]
    monkeypatch.setitem(sys.modules, "judge", module)
    monkeypatch.setitem(sys.modules, "kind", types.SimpleNamespace(check_row=lambda row: None))
    split = Corpus(["a", "b"], [0, 0], [{"grade": 1}, {}], ["a.csv line 2", "a.csv line 3"])
    (tmp_path / "a:b").mkdir()
    row_checks.check(
        ["judge:score", "length", str(tmp_path / "a:b")], split._replace(rows=split.rows[:1], places=split.places[:1])
    )
    with pytest.raises(ValueError, match=r"^a\.csv line 3: KeyError: 'grade'"):
        row_checks.check(["kind:score", "judge:score"], split)
    module.check_row = lambda row: sys.exit(0)
    with pytest.raises(ValueError, match=r"^a\.csv line 2: SystemExit: 0"):
        row_checks.check(["judge:score"], split)


def test_a_check_cannot_change_the_rows(monkeypatch):
    """Fails when check_row gets the row itself, or a copy that shares its nested values."""
    module = types.ModuleType("judge")
    module.check_row = lambda row: row["turns"].append(row.pop("text"))
    monkeypatch.setitem(sys.modules, "judge", module)
    split = Corpus(["a"], [0], [{"text": "a", "turns": ["b"]}], ["a.csv line 2"])
    row_checks.check(["judge:score"], split)
    assert split.rows == [{"text": "a", "turns": ["b"]}]
