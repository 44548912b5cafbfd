"""Runs of Weights & Biases: what is sent, and that a job that was killed offline leaves one run without a row twice."""

import contextlib
import importlib.util
import json
import struct
import sys
import types

import pytest

from tests.commands import ENV, kill_when, main_command, run, start
from tests.settings_of import settings_of
from warp_jax.training import wandb_run
from warp_jax.training.metric_writer import MetricWriter, read_rows

PROJECT = {"logging.wandb_project": "warp"}


class _Service(types.ModuleType):
    """Stands for the package wandb: keeps the arguments and rows of each run."""

    def __init__(self, mode="online", next_step=0, logged_in=True):
        super().__init__("wandb")
        self.runs, self.next_step, self.logged_in = [], next_step, logged_in
        self.Error, self.Settings = RuntimeError, dict
        self.settings = types.SimpleNamespace(mode=mode)

    def setup(self):
        return self

    def login(self, **options):
        assert options == {"prompt": False, "verify": False}
        return self.logged_in

    def init(self, **options):
        run = types.SimpleNamespace(options=options, rows={}, offline=self.settings.mode == "offline", exit_code=None)
        run.step = self.next_step
        run.log = lambda row, step, commit: run.rows.update({step: row})
        run.finish = lambda exit_code: setattr(run, "exit_code", exit_code)
        self.runs.append(run)
        return run


def _write(workdir, first, last, start_step=0):
    """Write the rows of steps first .. last - 1 of a run."""
    settings, directory = settings_of(PROJECT), workdir / "iteration_1" / "run_2"
    with contextlib.closing(
        MetricWriter(directory, start_step, wandb_run.open_run(settings, workdir, directory))
    ) as writer:
        for step in range(first, last):
            writer.write(step, {"loss": step + 0.5})


def test_a_run_is_resumed_at_the_step_that_wandb_needs_next(tmp_path, monkeypatch):
    """Fails when the id changes, a row is sent twice or not at all, or the run is not put into its group."""
    workdir = tmp_path / "sweep" / "mu_0.01"
    monkeypatch.setitem(sys.modules, "wandb", service := _Service())
    _write(workdir, 0, 4)
    service.next_step = 3  # the last row was lost
    _write(workdir, 2, 6, start_step=2)
    first, second = service.runs
    assert first.rows == {step: {"step": step, "loss": step + 0.5} for step in range(4)}
    assert list(second.rows) == [3, 4, 5]
    assert (first.exit_code, second.exit_code) == (0, 0)
    for name in ("id", "project", "group", "name", "resume"):
        assert first.options[name] == second.options[name]
    assert first.options["project"] == "warp"
    assert first.options["group"] == "sweep/mu_0.01"
    assert first.options["tags"] == ["sweep"]
    assert first.options["name"] == "mu_0.01/iteration_1/run_2"
    assert first.options["resume"] == "allow"
    assert first.options["config"]["warp"]["num_runs"] == 2


@pytest.mark.parametrize("where", ["a step", "the last upload"])
def test_a_job_that_fails_is_not_shown_as_finished(tmp_path, monkeypatch, where):
    """Fails when an error in a step, or when the files are closed, leaves the run open or finished."""
    monkeypatch.setitem(sys.modules, "wandb", service := _Service())
    writer = MetricWriter(tmp_path / "sft", 0, wandb_run.open_run(settings_of(PROJECT), tmp_path, tmp_path / "sft"))
    if where == "the last upload":
        monkeypatch.setattr(writer, "publish", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), contextlib.closing(writer):
        writer.write(0, {"loss": 1 / (where != "a step")})
    assert service.runs[0].exit_code == 1


def test_rows_from_before_wandb_are_sent_too(tmp_path, monkeypatch):
    """Fails when the kept rows are not shown to the observer, or rows after the saved state are."""
    with contextlib.closing(MetricWriter(tmp_path / "iteration_1" / "run_2")) as writer:
        for step in range(5):
            writer.write(step, {"loss": step + 0.5})
    monkeypatch.setitem(sys.modules, "wandb", service := _Service())
    _write(tmp_path, 3, 4, start_step=3)
    assert list(service.runs[0].rows) == [0, 1, 2, 3]


def test_without_a_project_nothing_is_imported(tmp_path, monkeypatch):
    """Fails when wandb is needed although it is off."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    wandb_run.check(settings_of())
    assert wandb_run.open_run(settings_of(), tmp_path, tmp_path / "sft") is None


def test_what_is_missing_is_said_before_the_job_starts(monkeypatch):
    """Fails when a missing package or login is only noticed when a run begins, or offline mode needs a login."""
    settings = settings_of(PROJECT)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb_project: .* run: pip install 'warp_jax\[wandb\]'"):
        wandb_run.check(settings)
    monkeypatch.setitem(sys.modules, "wandb", _Service(logged_in=False))
    with pytest.raises(ValueError, match="wandb_project: not logged in; run: wandb login, or set WANDB_MODE=offline"):
        wandb_run.check(settings)
    for service in (_Service(), _Service("offline", logged_in=False)):
        monkeypatch.setitem(sys.modules, "wandb", service)
        wandb_run.check(settings)


@pytest.mark.parametrize("name", ["a/b", "why?", "x" * 129])
def test_a_project_that_wandb_refuses_is_refused_at_once(name):
    """Fails when the characters or the length of a project's name are not checked."""
    with pytest.raises(ValueError, match=r"config\.logging\.wandb_project: got"):
        settings_of({"logging.wandb_project": name})


def _records(path):
    """The records of a .wandb file: a LevelDB log, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, []
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if (left := -at % 2**15) < 7 and left:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def _sent(folder):
    """The rows of the one offline run in a folder, without what wandb adds."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for record in _records(path):
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            assert items["_step"] == items["step"]
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return path.stem, rows


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs pip install 'warp_jax[wandb]'")
def test_a_job_killed_and_resumed_offline_leaves_one_run_with_each_row_once(tmp_path):
    """Fails when rows after the saved state stay in the run, are written twice, or rows before it are left out."""
    workdir = tmp_path / "run"
    changes = {"logging.wandb_project": "warp", "checkpoint_every": 2, "rewards.sentiment.weight": 0.0}
    changes |= {"rewards.length.weight": 1.0, "gold.source": "", "data.label_field": "", "warp.num_iterations": 1}
    changes |= {"warp.steps_per_iteration": "(40,)", "evaluation.every": 40}
    arguments = [f"--config.{name}={value}" for name, value in changes.items()]
    command = main_command("--config=configs/tiny.py", f"--workdir={workdir}", *arguments)
    directory = workdir / "iteration_1" / "run_1"
    environment = {"WANDB_MODE": "offline"}
    process = start(command, ENV | environment)
    kill_when(directory / "state" / "6", process)
    assert 6 <= len(read_rows(directory / "metrics.jsonl")) < 40
    (old,) = directory.glob("wandb/offline-run-*")
    done = run(command, **environment)
    assert done.returncode == 0, done.stderr
    assert not old.exists()
    for part in ("sft", "iteration_1/run_1", "iteration_1/run_2"):
        name, rows = _sent(workdir / part)
        assert rows == read_rows(workdir / part / "metrics.jsonl")
        assert name == "run-" + json.loads((workdir / part / "wandb.json").read_text())["id"]
