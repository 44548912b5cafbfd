"""A workdir belongs to one config and to one set of rows."""

import errno
import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import pytest

from tests.settings_of import settings_of
from warp_jax import cli, files, main
from warp_jax.data import corpus
from warp_jax.experiment import preparation, stages, workdir
from warp_jax.parallel import environment
from warp_jax.storage import manifest
from warp_jax.types import StorageError

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
    with pytest.raises(ValueError, match="or go on with --accept=data"):
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


HERE = environment.describe()
OTHERS = {
    "versions": ({**HERE, "versions": {**HERE["versions"], "jaxlib": "9.9"}}, "jaxlib .*, now jaxlib 9.9"),
    "device": ({**HERE, "device": "TPU v9"}, "cpu, now TPU v9"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_library_or_device_is_refused_until_it_is_accepted(tmp_path, monkeypatch, kind):
    """Fails when one of them is not compared, or is compared with one start only."""
    _claim(tmp_path, ROWS)
    other, words = OTHERS[kind]
    monkeypatch.setattr(environment, "describe", lambda: other)
    with pytest.raises(ValueError, match=rf"{words}.*--accept={kind}$"):
        _claim(tmp_path, ROWS, accept=set(OTHERS) - {kind})
    _claim(tmp_path, ROWS, accept=[kind])
    _claim(tmp_path, ROWS)
    monkeypatch.setattr(environment, "describe", lambda: HERE)  # parts of a job may run on both
    _claim(tmp_path, ROWS)


def test_another_commit_is_noted(tmp_path, monkeypatch, capsys):
    """Fails when a commit is refused, or passes without a word."""
    _claim(tmp_path, ROWS)
    assert "note" not in capsys.readouterr().err
    monkeypatch.setattr(environment, "describe", lambda: {**HERE, "commit": "abc+"})
    _claim(tmp_path, ROWS)
    assert "now 'abc+'" in capsys.readouterr().err


def test_the_first_start_locks_the_requirements(tmp_path, monkeypatch):
    """Fails when a later start replaces them, unless it was told to accept other versions."""
    _claim(tmp_path, ROWS)
    lock = tmp_path / "run" / workdir.REQUIREMENTS
    lines = lock.read_text().splitlines()
    assert f"jax=={jax.__version__}" in lines
    assert lines[0].startswith("# warp_jax==")
    assert lines[0].endswith(f"commit {environment.commit()}")
    monkeypatch.setattr(environment, "requirements", lambda: "jax==9.9")
    _claim(tmp_path, ROWS)
    assert lock.read_text().splitlines() == lines
    _claim(tmp_path, ROWS, accept=["versions"])
    assert lock.read_text() == "jax==9.9"
    lock.write_text("jax==8.8")
    with pytest.raises(StorageError, match=r"requirements\.lock is not what was written"):
        _claim(tmp_path, ROWS)


def test_requirements_of_a_killed_start_are_noted_by_the_next(tmp_path):
    """Fails when a kill between the lock file and the note of its checksum leaves it without one for ever."""
    _claim(tmp_path, ROWS)
    (tmp_path / "run" / manifest.CHECKSUMS).unlink()
    _claim(tmp_path, ROWS)
    assert manifest.is_noted(tmp_path / "run", workdir.REQUIREMENTS)


def test_requirements_are_not_written_if_packages_cannot_be_listed(monkeypatch):
    """Fails when a process without a free descriptor locks few packages, or no commit."""

    def full(*args, **options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    for place, function in (((os, "listdir"), environment.requirements), ((subprocess, "run"), environment.commit)):
        with monkeypatch.context() as patch:
            patch.setattr(*place, full)
            with pytest.raises(OSError, match="Too many open files"):
                function()


def test_a_project_that_is_not_installed_and_the_rest_of_a_package(tmp_path, monkeypatch):
    """Fails when a start from the project's folder ends in an error, or the lock names a package without a name."""
    (tmp_path / "rest-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "None" not in environment.requirements()
    found = importlib.metadata.distribution

    def without(name):
        if name == "warp_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without)
    assert environment.describe()["versions"] == HERE["versions"] | {"warp_jax": "not installed"}
    assert environment.requirements().startswith("# warp_jax==not installed commit")


def test_files_of_a_killed_process_are_noted_or_deleted(tmp_path):
    """Fails when a tokenizer without a checksum stays unchecked, or a half-written file stays for ever."""
    _claim(tmp_path, ROWS)
    folder = tmp_path / "run"
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sft").mkdir()
    old, new = folder / "sft" / ".summary.json.1234.partial", folder / ".front.csv.5678.partial"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (1, 1))
    _claim(tmp_path, ROWS)
    assert manifest.is_noted(folder, "tokenizer.json")
    assert (old.exists(), new.exists()) == (False, True)


def test_a_workdir_that_vanishes_is_not_made_again(tmp_path, monkeypatch):
    """Fails when the job goes on in a new folder, without the files that it had written before."""

    def move(folder):
        folder.rename(tmp_path / "away")

    monkeypatch.setattr(workdir, "check_made", move)
    with pytest.raises(StorageError, match="has vanished"):
        _claim(tmp_path, ROWS)
    assert not (tmp_path / "run").exists()


def test_damaged_starts_are_no_reason_to_refuse(tmp_path):
    """Fails when a broken line of the log ends in a traceback."""
    for content in (b"", b"\xff\n", b"[]\n", b"{\n", b'{"versions": [], "device": "cpu"}\n', b"null\n"):
        _claim(tmp_path, ROWS)
        (tmp_path / "run" / workdir.STARTS).write_bytes(content)
    _claim(tmp_path, ROWS)


def test_a_damaged_tokenizer_or_gold_reward_is_named(tmp_path):
    """Fails when a file made before training is not compared with its checksum, or a deleted one is missed."""
    _claim(tmp_path, ROWS)
    folder = tmp_path / "run"
    for name in ("tokenizer.json", "gold/gold.json"):
        files.write_text(folder / name, "what was written")
        manifest.note(folder, name)
        (folder / name).write_text("what was Written")
        with pytest.raises(StorageError, match=f"{name} is not what was written; delete it"):
            _claim(tmp_path, ROWS)
        with pytest.raises(StorageError, match="made again, and is not what it was"):
            manifest.note(folder, name)
        (folder / name).unlink()
        _claim(tmp_path, ROWS)


def test_the_same_rows_are_accepted_in_any_order(tmp_path):
    """Fails when the order of a file, or of the fields of a row, counts: the splits are the same."""
    _claim(tmp_path, ROWS)
    _claim(tmp_path, [dict(reversed(row.items())) for row in reversed(ROWS)])


def test_an_older_workdir_is_accepted_and_keeps_its_rows(tmp_path):
    """Fails when a workdir without a fingerprint, or without settings that are newer, is refused or never gets one, or
    when limits cannot be changed."""
    _claim(tmp_path, ROWS)
    (tmp_path / "run" / workdir.DATA).unlink()
    config = files.read_json(tmp_path / "run" / workdir.CONFIG)
    del config["sampling"]["stop_tokens"], config["sampling"]["top_k"], config["sampling"]["top_p"]
    del config["rl"]["importance_cap"], config["health"]
    files.write_json(tmp_path / "run" / workdir.CONFIG, config)
    _claim(tmp_path, ROWS)
    _claim(tmp_path, ROWS, **{"health.max_kl": 50.0, "health.action": "stop", "evaluation.pass_threshold": 0.5})
    assert files.read_json(tmp_path / "run" / workdir.CONFIG)["sampling"]["stop_tokens"] == []
    with pytest.raises(ValueError, match=r"evaluation\.temperature was None, now 0\.5"):
        _claim(tmp_path, ROWS, **{"evaluation.temperature": 0.5})
    with pytest.raises(ValueError, match="other rows"):
        _claim(tmp_path, ROWS[1:])


def test_another_entry_of_a_run_is_refused(tmp_path):
    """Fails when the settings of a run may change on resume, or an entry that is equal counts as changed."""
    runs = ({"rl.kl_coef": 0.2}, {})
    _claim(tmp_path, ROWS, **{"warp.runs": runs})
    _claim(tmp_path, ROWS, **{"warp.runs": runs})
    with pytest.raises(ValueError, match=r"made by another config: warp\.runs was \[{'rl\.kl_coef': 0\.2}, {}\], now"):
        _claim(tmp_path, ROWS, **{"warp.runs": ({"rl.kl_coef": 0.3}, {})})


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
