"""The flow of Algorithm 1, on policies whose merge is known by hand."""

import contextlib
import shutil
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax import files
from warp_jax.evaluation import points as named
from warp_jax.evaluation.measure import Evaluation
from warp_jax.experiment import warp
from warp_jax.storage import checkpoint

SFT = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
LENGTHS = {1: 2.0, 2: 3.0, 3: 5.0}  # of the task vectors of each iteration; they point along two axes of their own
STEPS = {(i, r): length * np.eye(6)[2 * i + r - 3] for i, length in LENGTHS.items() for r in (1, 2)}

TRAINER = types.SimpleNamespace(programs=types.SimpleNamespace(weights=lambda params, start: params))


def _evaluation(value):
    values = np.full(3, value, np.float32)
    ids = values[:, None]
    return Evaluation(*[values] * 4, np.array(1.0), ids, ids > 0, np.arange(len(values)))


class _Progress:
    start_phase = note = on_step = expect_evaluations = lambda *args, **kwargs: None

    def __init__(self):
        self.ended = []

    def end_phase(self, num_steps, *, evaluations_left_out):
        self.ended.append((num_steps, evaluations_left_out))


def _tree(vector):
    return {"layers": {"w": jnp.asarray(vector, jnp.float32)[None]}}


def _vector(tree):
    return np.asarray(tree["layers"]["w"][0])


@pytest.fixture
def job(monkeypatch):
    """Runs Algorithm 1 with policies that end at init + STEPS; returns its points, and the params it used."""

    def run(workdir, keep=(), **changes):
        changes = {"num_iterations": 3, "steps_per_iteration": (6, 6, 6), **changes}
        changes = {f"warp.{name}": value for name, value in changes.items()}
        settings = settings_of({**changes, **dict(keep), "evaluation.every": 6, "front.etas": (0.3, 1.0)})
        starts, measured, planned = {}, {}, set()

        def train_policy(trainer, init_params, *, iteration, run, schedule):
            starts[iteration, run] = _vector(init_params)
            for step in range(1, schedule.num_steps + 1):
                moved = STEPS[iteration, run] * step / schedule.num_steps
                policy, anchor = (_tree(_vector(init_params) + x) for x in (moved, moved / 4))
                if schedule.after_step(step, types.SimpleNamespace(params=policy, anchor_params=anchor)):
                    break
            return policy

        class Store:
            def __init__(self, *args):
                pass

            def missing(self, names):
                planned.update(names)
                return sorted(set(names) - measured.keys())

            def saved(self, names):
                return {}

            def get(self, name, make_params):
                measured.setdefault(name, _vector(make_params()))
                return _evaluation(np.linalg.norm(measured[name] - SFT))

        monkeypatch.setattr(warp.reinforce, "run_policy", train_policy)
        monkeypatch.setattr(warp, "EvaluationStore", Store)
        examiner = types.SimpleNamespace(sft_params=_tree(SFT))
        run.made = warp.make_job(settings, (TRAINER,) * settings.warp.num_runs, examiner, workdir, _Progress())
        points = warp.run_warp(run.made)
        assert measured.keys() == named.evaluation_names(settings, run.made.last_step)
        assert measured.keys() <= planned
        return points, starts, measured

    return run


def test_every_step_of_algorithm_1(job, tmp_path):
    """Fails when an iteration starts from the merge, from SFT, or from a step between SFT and the merge, when runs
    start apart, when the front goes from the iteration's init instead of SFT, or a merge is linear.
    """
    points, starts, measured = job(tmp_path, liti_rate=0.3)
    init = SFT
    for i in LENGTHS:
        for r in (1, 2):
            np.testing.assert_allclose(starts[i, r], init, rtol=1e-6)
            np.testing.assert_allclose(measured[f"policy_i{i}_r{r}_s6"], init + STEPS[i, r], rtol=1e-6)
        merged = init + np.sqrt(0.5) * (STEPS[i, 1] + STEPS[i, 2])  # slerp at 90 degrees and weight 1/2
        np.testing.assert_allclose(measured[f"merged_i{i}"], merged, rtol=1e-6)
        np.testing.assert_allclose(measured[f"liti_i{i}_e0.3"], SFT + 0.3 * (merged - SFT), rtol=1e-6)
        init = init + 0.3 * (merged - init)
    per_iteration = [(("policy", i, 1), ("policy", i, 2), ("merged", i, 0)) for i in LENGTHS]
    found = [(p.stage, p.iteration, p.run) for p in points if p.stage != "liti"]
    assert found == [("sft", 0, 0), *(point for points in per_iteration for point in points)]


def test_a_run_as_a_job_starts_where_it_does_in_the_whole(job, tmp_path):
    """Fails when a run of a later iteration, as a job of its own, starts from SFT or from the merge."""
    _, starts, _ = job(tmp_path, liti_rate=0.3)
    for i in LENGTHS:
        np.testing.assert_array_equal(_vector(job.made.init_params(i)), starts[i, 1])


def test_liti_rate_0_returns_to_init(job, tmp_path):
    """Fails when the rate weighs init: at 0 the second iteration starts where the first did."""
    _, starts, _ = job(tmp_path, liti_rate=0.0)
    np.testing.assert_array_equal(starts[2, 1], starts[1, 1])


def test_a_stored_run_is_not_trained_again(job, tmp_path):
    """Fails when a finished run or merge is made again."""
    job(tmp_path)
    points, starts, _ = job(tmp_path)
    assert starts == {}
    assert len(points) == 16


def test_a_run_finished_before_its_lock_is_taken_is_not_trained_again(job, tmp_path, monkeypatch):
    """Fails when a job looks for the policy only before it waits its turn: another may have made it since."""

    @contextlib.contextmanager
    def made_meanwhile(path, on_wait):
        checkpoint.save_params(path.parent / "params", _tree(SFT))
        yield

    monkeypatch.setattr(warp.hosts, "locked", made_meanwhile)
    monkeypatch.setattr(warp.Job, "merge", lambda self, init_params, iteration: init_params)
    _, starts, _ = job(tmp_path)
    assert starts == {}


def test_a_merge_is_made_once(job, tmp_path, monkeypatch):
    """Fails when two jobs write one merge, or the second makes it again."""
    job(tmp_path)
    shutil.rmtree(tmp_path / "iteration_1" / "merged")
    with files.locked(tmp_path / "iteration_1" / "lock", pytest.fail), pytest.raises(warp.BusyError, match="the merge"):
        job(tmp_path)

    @contextlib.contextmanager
    def made_meanwhile(path, on_wait):
        checkpoint.save_params(path.parent / "merged", _tree(SFT))
        yield

    monkeypatch.setattr(warp.hosts, "locked", made_meanwhile)
    _, _, measured = job(tmp_path)
    np.testing.assert_array_equal(measured["merged_i1"], SFT)


def test_what_a_kill_left_of_a_finished_run_is_deleted(job, tmp_path):
    """Fails when the state of a run whose policy is stored, many times its size, stays for ever."""
    job(tmp_path)
    state = tmp_path / "iteration_1" / "run_2" / "state"
    state.mkdir()
    job(tmp_path)
    assert not state.exists()


def test_a_merge_that_cannot_be_made_is_said(job, tmp_path, monkeypatch):
    """Fails when opposite task vectors end a job in a traceback."""
    monkeypatch.setitem(STEPS, (1, 2), -STEPS[1, 1])
    with pytest.raises(warp.JobError, match=r"merge: .*opposite"):
        job(tmp_path)


def test_the_lerp_baseline_is_the_mean(job, tmp_path):
    """Fails when warp.merge is not read."""
    _, _, measured = job(tmp_path, merge="lerp")
    np.testing.assert_allclose(measured["merged_i1"], SFT + 0.5 * (STEPS[1, 1] + STEPS[1, 2]), rtol=1e-6)


KEEP = {"keep.anchor": True, "keep.steps": (2, 3, 6)}


def test_kept_weights_have_fronts_of_their_own(job, tmp_path):
    """Fails when another step is kept, the anchor is the policy or that of another step, the mean weighs a step more,
    or the fronts do not start at SFT.
    """
    points, _, measured = job(tmp_path, KEEP, liti_rate=0.3)
    init = SFT
    for i in LENGTHS:
        for r in (1, 2):
            ends = {"anchor": init + STEPS[i, r] / 4, "average": init + STEPS[i, r] * (2 + 3 + 6) / 18}
            for stage, end in ends.items():
                np.testing.assert_allclose(measured[f"{stage}_i{i}_r{r}_e1"], end, rtol=1e-6)
                np.testing.assert_allclose(measured[f"{stage}_i{i}_r{r}_e0.3"], SFT + 0.3 * (end - SFT), rtol=1e-6)
                found = [p.eta for p in points if (p.stage, p.iteration, p.run) == (stage, i, r)]
                assert found == [0.3, 1.0]
            for step in (2, 3, 6):
                np.testing.assert_allclose(measured[f"policy_i{i}_r{r}_s{step}"], init + STEPS[i, r] * step / 6, 1e-6)
        init = init + 0.3 * (measured[f"merged_i{i}"] - init)


def test_a_kept_policy_that_is_saved_is_not_saved_again(job, tmp_path):
    """Fails when a resumed run cannot save what an earlier process saved, or a deleted one is not made again."""
    job(tmp_path, KEEP)
    folder = tmp_path / "iteration_1" / "run_1"
    for name in ("params", "anchor", "step_3"):
        shutil.rmtree(folder / name)
        _, starts, _ = job(tmp_path, KEEP)
        assert list(starts) == [(1, 1)]
        assert (folder / name).exists()


def test_a_run_is_finished_at_its_limit_and_merged(job, tmp_path):
    """Fails when a run ends before or after the first evaluation beyond the limit, the limit of another run counts, the
    merge takes another policy, or evaluations after the end are expected.
    """
    runs = ({"warp.stop_at_kl": 0.9}, {})  # run 1 of iteration 1 is 2 from SFT after 6 steps: 1 after step 3
    points, _, measured = job(tmp_path, KEEP, num_iterations=1, steps_per_iteration=(6,), runs=runs, merge="lerp")
    steps = [(p.run, p.step) for p in points if p.stage == "policy"]
    assert steps == [(1, 2), (1, 3), (2, 2), (2, 3), (2, 6)]
    np.testing.assert_allclose(measured["merged_i1"], SFT + 0.5 * (STEPS[1, 1] / 2 + STEPS[1, 2]), rtol=1e-6)
    np.testing.assert_allclose(measured["anchor_i1_r1_e1"], SFT + STEPS[1, 1] / 8, rtol=1e-6)
    end = files.read_json(tmp_path / "iteration_1" / "run_1" / "end.json")
    assert end == {"step": 3, "sft_kl": 1.0, "stop_at_kl": 0.9}
    assert not (tmp_path / "iteration_1" / "run_2" / "end.json").exists()
    assert job.made.progress.ended == [(3, 1), (6, 0)]  # of run 1, the policy after step 6 is left out
    again, starts, _ = job(tmp_path, KEEP, num_iterations=1, steps_per_iteration=(6,), runs=runs, merge="lerp")
    assert starts == {}
    assert job.made.progress.ended == [(3, 0), (6, 0)]  # it was not expected
    assert [p[:5] for p in again if p.eta == p.eta] == [p[:5] for p in points if p.eta == p.eta]
