"""A workdir belongs to one config and to one set of rows."""

import json
import sys

import jax
import pytest

from tests.settings_of import settings_of
from warp_jax import cli, files, main
from warp_jax.data import corpus
from warp_jax.experiment import preparation, stages, workdir

ROWS = [{"text": f"film number {i}", "label": i % 2, "answer": i} for i in range(300)]
CHANGES = {"data.reward_fraction": 0.3, "data.gold_fraction": 0.3, "data.prompts_fraction": 0.2}


def _claim(tmp_path, rows, accept=(), **changes):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_of({**CHANGES, "data.source": str(source), **changes})
    workdir.claim(settings, tmp_path / "run", preparation.load_corpora(settings), accept)


CHANGED = {
    "another field": [*ROWS[:7], {**ROWS[7], "answer": 8}, *ROWS[8:]],
    "a further field": [*ROWS[:7], {**ROWS[7], "more": None}, *ROWS[8:]],
    "another label": [*ROWS[:7], {**ROWS[7], "label": 0}, *ROWS[8:]],
    "a row less": ROWS[:-1],
    "a row twice": [*ROWS, ROWS[7]],
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_rows_are_refused(tmp_path, change):
    """Fails when only texts, labels, the number of rows or the first rows are compared: old and new rows would share
    one front.
    """
    _claim(tmp_path, ROWS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=r"was made with other rows of .*rows\.jsonl \(300 rows, now \d+\)") as error:
        _claim(tmp_path, CHANGED[change])
    assert "\n" not in str(error.value)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_fingerprint_edited_by_hand_is_refused(tmp_path):
    """Fails when a data.json without the number of rows ends in a traceback, or counts as an older workdir."""
    _claim(tmp_path, ROWS)
    (tmp_path / "run" / workdir.DATA).write_text("{}")
    with pytest.raises(ValueError, match=r"\(\? rows, now 300\)"):
        _claim(tmp_path, ROWS)


def test_other_rows_are_accepted_by_name_and_noted(tmp_path):
    """Fails when --accept=models lets rows change, or the start does not say what was accepted."""
    _claim(tmp_path, ROWS)
    with pytest.raises(ValueError, match="or go on with both by --accept=data"):
        _claim(tmp_path, ROWS[1:], accept=["models", "rewards"])
    _claim(tmp_path, ROWS[1:], accept=["data"])
    _claim(tmp_path, ROWS[1:])
    starts = [json.loads(line) for line in (tmp_path / "run" / workdir.STARTS).read_text().splitlines()]
    assert [start["accepted"] for start in starts] == [[], ["data"], []]
    assert starts[0]["versions"]["jax"] == jax.__version__


def test_other_code_of_a_reward_function_is_refused(tmp_path, monkeypatch):
    """Fails when the rewards of two versions of a function share one front, or code of this package counts."""
    module = tmp_path / "a_users_rewards.py"
    monkeypatch.syspath_prepend(tmp_path)
    parts = {
        "mine": {"source": "a_users_rewards:score", "weight": 1.0},
        "right": {"source": "warp_jax.rewards.math_answers:score", "weight": 0.5},
    }
    rows = [{**row, "answer": "3"} for row in ROWS]
    for code in ("score = lambda p, c, rows: [1.0] * len(c)", "score = lambda p, c, rows: [0.5] * len(c)"):
        monkeypatch.delitem(sys.modules, "a_users_rewards", raising=False)
        module.write_text(code + "\n")
        if "0.5" in code:
            with pytest.raises(ValueError, match=r"other code of a_users_rewards:score.*--accept=rewards"):
                _claim(tmp_path, rows, rewards=parts)
            _claim(tmp_path, rows, accept=["rewards"], rewards=parts)
        _claim(tmp_path, rows, rewards=parts)
    assert files.read_json(tmp_path / "run" / workdir.REWARDS).keys() == {"a_users_rewards:score"}


@pytest.mark.parametrize("name", [workdir.DATA, workdir.FINGERPRINTS, workdir.REWARDS])
@pytest.mark.parametrize("content", ["[]", "null", "{", ""])
def test_damaged_fingerprints_are_one_line(tmp_path, name, content):
    _claim(tmp_path, ROWS)
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=name) as error:
        _claim(tmp_path, ROWS)
    assert "\n" not in str(error.value)


def test_the_same_rows_are_accepted_in_any_order(tmp_path):
    """Fails when the order of a file, or of the fields of a row, counts: the splits are the same."""
    _claim(tmp_path, ROWS)
    _claim(tmp_path, [dict(reversed(row.items())) for row in reversed(ROWS)])


def test_an_older_workdir_is_accepted_and_keeps_its_rows(tmp_path):
    """Fails when a workdir without a fingerprint, or without settings that are newer, is refused or never gets one."""
    _claim(tmp_path, ROWS)
    (tmp_path / "run" / workdir.DATA).unlink()
    config = files.read_json(tmp_path / "run" / workdir.CONFIG)
    del config["sampling"]["stop_tokens"], config["rl"]["importance_cap"]
    files.write_json(tmp_path / "run" / workdir.CONFIG, config)
    _claim(tmp_path, ROWS)
    assert files.read_json(tmp_path / "run" / workdir.CONFIG)["sampling"]["stop_tokens"] == []
    with pytest.raises(ValueError, match="other rows"):
        _claim(tmp_path, ROWS[1:])


def test_settings_that_are_refused_now_are_corrected_in_the_workdir(tmp_path):
    """Fails when the error does not say which file has the value, or the corrected workdir is refused."""
    _claim(tmp_path, ROWS)
    path = tmp_path / "run" / workdir.CONFIG
    good = files.read_json(path)
    files.write_json(path, {**good, "front": {**good["front"], "etas": [0.3, 0.3]}})
    for action in (lambda: _claim(tmp_path, ROWS), lambda: stages.Workdir(tmp_path / "run")):
        with pytest.raises(
            ValueError, match=r"config\.json: config\.front\.etas: .* twice .*, correct it in that file$"
        ):
            action()
    files.write_json(path, {**good, "front": {**good["front"], "etas": [0.3]}})
    _claim(tmp_path, ROWS)


def test_the_program_compares_the_rows(tmp_path):
    """Fails when the fingerprint is not that of the rows which are loaded."""
    source = tmp_path / "rows.jsonl"
    settings = settings_of({**CHANGES, "data.source": str(source)})
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    main.check(settings, tmp_path / "run")
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    with pytest.raises(ValueError, match="other rows"):
        main.check(settings, tmp_path / "run")
    assert cli.BAD_INPUT == 2


def test_rows_that_json_cannot_hold_have_a_fingerprint():
    """Fails when a date or an array of numpy, which Parquet and TFDS give, is an error or is cut to a few numbers."""
    import datetime

    import numpy as np

    def fingerprint(**row):
        return corpus.fingerprint({"eval": corpus.Corpus(["a"], [0], [row], ["row 0"])})

    large = np.arange(9_999)
    changed = np.where(large == 5_000, 0, large)
    assert fingerprint(a=large) != fingerprint(a=changed)
    assert fingerprint(a=datetime.date(2026, 1, 2)) != fingerprint(a=datetime.date(2026, 1, 3))
    assert fingerprint(a=b"x", b=float("nan")) == fingerprint(b=float("nan"), a=b"x")
