"""Runs and merges as jobs of their own, against one job that does everything."""

import types

import jax
import numpy as np
import pytest

from tests.commands import TINY, finish, kill_when, main_command, run, start, train
from tests.settings_of import settings_of
from warp_jax import files
from warp_jax.experiment import jobs, stages, status
from warp_jax.types import StorageError

M = 3
SETTINGS = (
    TINY,
    f"--config.warp.num_runs={M}",
    "--config.warp.num_iterations=1",
    "--config.warp.steps_per_iteration=(6,)",
    "--config.front.etas=(0.3, 1.0)",
    "--config.warp.runs=({}, {'warp.stop_at_kl': 1e-9, 'seed': 3}, {'rl.kl_coef': 0.3, 'rewards.length.weight': -0.1})",
    "--config.keep.anchor=True",
    "--config.keep.steps=(2, 4)",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A workdir made by one job."""
    return train(tmp_path_factory.mktemp("whole") / "run", *SETTINGS)


@pytest.mark.slow
def test_jobs_in_any_order_with_a_kill_make_the_same_bits(whole, tmp_path):
    """Fails when a run depends on the process or the order it is trained in, when jobs that start together spoil what
    they share, when a run has the settings of another, or the merge takes policies in the order in which they end."""
    workdir = tmp_path / "run"
    together = [start(main_command(*SETTINGS, f"--workdir={workdir}", f"--run={number}")) for number in (3, 1)]
    state = workdir / "iteration_1" / "run_3" / "state" / "4"
    kill_when(state, together[0])
    code, _, errors = finish(together[1])
    assert code == 0, errors
    settings = settings_of({"warp.num_runs": M})
    with pytest.raises(ValueError, match="run 2 of iteration 1 is not finished"):
        jobs.choose_part(settings, workdir, run=0, merge=True, iteration=0)
    for part in ("--run=2", "--run=3", "--merge"):
        train(workdir, *SETTINGS, part)
    assert (workdir / "front.csv").read_bytes() == (whole / "front.csv").read_bytes()
    names = sorted(path.name for path in (whole / "evaluations").iterdir())
    assert names == sorted(path.name for path in (workdir / "evaluations").glob("*.npz"))  # a kill may leave .partial
    for name in names:
        with np.load(whole / "evaluations" / name) as want, np.load(workdir / "evaluations" / name) as got:
            assert all(np.array_equal(want[key], got[key], equal_nan=True) for key in want)
    for name in ("geometry.json", "run_2/end.json"):
        assert files.read_json(workdir / "iteration_1" / name) == files.read_json(whole / "iteration_1" / name)


def test_kept_weights_are_loaded_by_name(whole):
    """Fails when a kept stage cannot be sampled or exported, its folder is that of another one, the average is not the
    mean of the kept policies, or a run goes on after its limit.
    """
    job = stages.Workdir(whole)
    names = [f"iteration_1/run_1{kind}" for kind in ("", "/anchor", "/average", "/step_2", "/step_4")]
    names += [f"iteration_1/run_2{kind}" for kind in ("", "/anchor", "/step_2")]  # it ends after step 2
    assert set(names) < set(job.stages())
    assert files.read_json(whole / "iteration_1/run_2/end.json")["step"] == 2
    policy, anchor, average, second, fourth, early, _, same = ([*jax.tree.leaves(job.load(x)[0])] for x in names)
    for x, y, mean in zip(second, fourth, average, strict=True):
        np.testing.assert_allclose((np.asarray(x) + np.asarray(y)) / 2, mean, rtol=1e-5, atol=1e-7)
    assert not any(np.array_equal(x, y) for x, y in zip(policy, anchor, strict=True))
    assert all(np.array_equal(x, y) for x, y in zip(early, same, strict=True))
    assert [part.name for part in status.read(whole, verify=True) if part.state != status.DONE] == []


def test_a_run_is_not_trained_twice_at_once(tmp_path):
    """Fails when the lock of a run is not held, or not given back."""
    told = []
    with files.locked(tmp_path / "lock", told.append):
        assert told == []
        holder = (
            "import sys, pathlib; from warp_jax import files\n"
            "def refuse(owner): sys.exit(f'busy: {owner}')\n"
            f"with files.locked(pathlib.Path({str(tmp_path / 'lock')!r}), refuse): print('mine')"
        )
        command = [*main_command()[:1], "-c", holder]
        assert run(command).stderr == "busy: another process\n"
    assert run(command).stdout == "mine\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"run": 3}, r"run: got 3, want 1 to warp.num_runs = 2"),
        ({"run": 1, "merge": True}, "want one of them"),
        ({"run": 1, "iteration": 3}, r"iteration: got 3, want 1 to warp.num_iterations = 2"),
        ({"run": 1, "iteration": 2}, r"2 starts from the merge of 1, which is missing; make its runs, then --merge"),
        ({"merge": True}, r"run 1 of iteration 1 is not finished; start it again: --run=1"),
        ({"iteration": 1}, r"want --run=M or --merge too"),
    ],
)
def test_parts_that_are_not_there_are_refused(tmp_path, flags, message):
    """Fails when a job starts from weights that are not there yet, or for a run that does not exist."""
    with pytest.raises(ValueError, match=message):
        jobs.choose_part(settings_of(), tmp_path, **{"run": 0, "merge": False, "iteration": 0, **flags})


def test_the_first_unmerged_iteration_is_chosen(tmp_path):
    """Fails when a job without an iteration goes back to a merged one."""
    choose = jobs.choose_part
    settings = settings_of()
    assert choose(settings, tmp_path, run=2, merge=False, iteration=0) == (1, 2)
    (tmp_path / "iteration_1" / "merged").mkdir(parents=True)
    assert choose(settings, tmp_path, run=2, merge=False, iteration=0) == (2, 2)
    assert choose(settings, tmp_path, run=2, merge=False, iteration=1) == (1, 2)
    assert choose(settings, tmp_path, run=0, merge=False, iteration=0) == jobs.WHOLE


def test_steps_of_each_part():
    """Fails when the time left of a job counts steps that other jobs make."""
    settings = settings_of({"warp.steps_per_iteration": (6, 9)})
    assert jobs.total_steps(settings) == 20 + 2 * 15
    assert jobs.total_steps(settings, jobs.Part(2, 1)) == 20 + 9
    assert jobs.total_steps(settings, jobs.Part(1, 0)) == 20


def test_the_report_gets_the_held_out_prompts(tmp_path, monkeypatch):
    """Fails when the report shows completions beside the prompts of training, or points that are not the job's."""
    trainer, examiner = types.SimpleNamespace(train_prompts="train"), types.SimpleNamespace(eval_prompts="eval")
    monkeypatch.setattr(jobs.preparation, "prepare", lambda *arguments: ("tokenizer", trainer, examiner))
    monkeypatch.setattr(jobs.warp, "make_job", lambda *arguments, **watched: arguments[1:3])
    monkeypatch.setattr(jobs.warp, "run_warp", lambda job: ["points", *job])
    monkeypatch.setattr(jobs.status, "progress", lambda workdir: "state")
    monkeypatch.setattr(jobs.writer, "write_report", lambda settings, *arguments: arguments)
    got = jobs.run_part(settings_of(), {}, tmp_path)
    assert got == (("tokenizer", "eval"), ["points", trainer, examiner], tmp_path, "state")


@pytest.fixture
def evaluating(tmp_path, monkeypatch):
    """Run a part that evaluates twice, with a function that writes its page; return the pages' arguments and notes."""
    examiner, watched, notes = types.SimpleNamespace(eval_prompts="eval"), {}, []

    def evaluate_twice(*arguments):
        watched["after_evaluation"]()
        watched["after_evaluation"]()

    monkeypatch.setattr(jobs.preparation, "prepare", lambda *arguments: ("tokenizer", (), examiner))
    monkeypatch.setattr(jobs.warp, "make_job", lambda *arguments, **more: watched.update(more))
    monkeypatch.setattr(jobs.warp, "run_one", evaluate_twice)
    monkeypatch.setattr(jobs.warp, "merge_one", evaluate_twice)
    monkeypatch.setattr(jobs.JobProgress, "left", lambda self: "about 3.0 min left")
    monkeypatch.setattr(jobs.JobProgress, "note", lambda self, text: notes.append(text))
    monkeypatch.setattr(jobs.status, "progress", lambda workdir, left: left)
    monkeypatch.setattr(jobs, "saved_points", lambda settings, workdir: ["saved"])

    def make(part, write_page):
        monkeypatch.setattr(jobs.writer, "write_page", lambda settings, *arguments: write_page(arguments))
        return jobs.run_part(settings_of(), {}, tmp_path, part), notes

    return make


@pytest.mark.parametrize(
    ("part", "seconds", "during"), [(jobs.Part(1, 1), 60.0, 1), (jobs.Part(1, 0), 60.0, 1), (jobs.Part(1, 1), 0.0, 2)]
)
def test_the_page_is_written_after_evaluations_and_at_the_end(
    tmp_path, monkeypatch, evaluating, *, part, seconds, during
):
    """Fails when the page waits for the end of the job, each evaluation writes it, the end of a run or a merge does
    not, it has no time left, or shows what is not saved.
    """
    monkeypatch.setattr(jobs, "PAGE_SECONDS", seconds)
    pages = []
    evaluating(part, pages.append)
    first = ("tokenizer", "eval"), ["saved"], tmp_path
    assert pages == [(*first, "about 3.0 min left")] * during + [(*first, "")]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad row"), StorageError("x is damaged")])
def test_a_page_that_cannot_be_written_does_not_stop_the_job(tmp_path, evaluating, error):
    """Fails when a job ends because of its page, or does not say what is missing."""

    def write_page(arguments):
        raise error

    line, notes = evaluating(jobs.Part(1, 1), write_page)
    assert line == "iteration 1 run 1: finished"
    assert notes == [f"{tmp_path / 'report.html'} is not written: {error}"] * 2
