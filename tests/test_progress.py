"""Estimates of the time left, with a fake clock."""

from warp_jax import progress


def test_time_left_counts_steps_and_evaluations(monkeypatch):
    """Fails when compiling or an evaluation counts as a step's time, the evaluations ahead are forgotten, or
    a time is made up before a step is timed."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    job = progress.JobProgress(10)
    job.expect_evaluations(3)
    job.start_phase("run", 10, finished=False)
    job.on_step(0, {})
    assert job.left() == ""
    for done, now in ((1, 100.0), (2, 102.0)):
        clock[0] = now
        job.on_step(done, {"loss": 1.0})
    assert job.left() == f"about {2 * 8 / 60:.1f} min left"
    clock[0] = 162.0
    job.on_evaluation("sft", 60.0)
    clock[0] = 166.0
    job.on_step(3, {"loss": 1.0})
    assert job.left() == f"about {(3 * 7 + 60 * 2) / 60:.1f} min left"


def test_phases_done_before_take_no_time(monkeypatch):
    """Fails when skipped steps count in the mean time of a step."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    job = progress.JobProgress(10)
    job.start_phase("first", 6, finished=True)
    job.start_phase("second", 4, finished=False)
    for done, now in ((0, 0.0), (1, 50.0), (2, 80.0)):
        clock[0] = now
        job.on_step(done, {"loss": 1.0} if done else {})
    assert job.left() == f"about {30 * 2 / 60:.1f} min left"


def test_a_phase_that_ends_early_leaves_no_steps(monkeypatch):
    """Fails when steps and evaluations that a run leaves out still count, or the next phase begins after them."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    job = progress.JobProgress(20)
    job.expect_evaluations(5)
    job.start_phase("first", 10, finished=False)
    for done, now in ((0, 0.0), (1, 50.0), (2, 52.0)):
        clock[0] = now
        job.on_step(done, {"loss": 1.0} if done else {})
    job.on_evaluation("policy", 60.0)
    job.end_phase(2, evaluations_left_out=3)
    job.start_phase("second", 10, finished=False)
    assert job.left() == f"about {(2 * 10 + 60) / 60:.1f} min left"
    assert job._progress.tasks[0].total == 12
