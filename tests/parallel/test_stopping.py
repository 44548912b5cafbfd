"""Stopping when asked: a signal ends a loop after its step, with everything saved."""

import math
import os
import signal
import time

import jax.numpy as jnp
import pytest

from warp_jax.parallel import stopping
from warp_jax.training import loop
from warp_jax.training.metric_writer import read_rows


@pytest.fixture(autouse=True)
def listening(monkeypatch):
    """Listen to the signals in this test, and to none of an earlier one."""
    monkeypatch.setattr(stopping, "_received", [])
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(directory, num_steps=7, *, signal_at=None, number=signal.SIGTERM, every=100, after_step=None):
    def step_fn(state, step):
        if step == signal_at:
            os.kill(os.getpid(), number)
        return {"w": state["w"] * 1.5 + step}, {"loss": jnp.float32(step)}

    def nothing(done, state):
        pass

    schedule = loop.Schedule(num_steps, directory, every, lambda *args: None, after_step or nothing)
    return loop.run_steps(step_fn, lambda: {"w": jnp.ones(3)}, schedule)["w"].tolist()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=str
)
def test_a_signal_ends_the_loop_after_its_step(tmp_path, number, code):
    """Mutation: SIGUSR1 not listened to; the state not saved, or the one before; the code of SIGINT for all."""
    want = run(tmp_path / "unbroken")
    with pytest.raises(stopping.Stopped, match="saved after step 4") as stopped:
        run(tmp_path / "run", signal_at=3, number=number)
    assert (stopped.value.exit_code, stopped.value.signal) == (code, signal.Signals(number).name)
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["4"]
    stopping._received.clear()
    assert run(tmp_path / "run") == want
    assert [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(7))


def test_a_job_stopped_more_often_than_it_saves_gets_ahead(tmp_path):
    want = run(tmp_path / "unbroken", 8)
    for at in (1, 3, 5):
        with pytest.raises(stopping.Stopped):
            run(tmp_path / "run", 8, signal_at=at)
        stopping._received.clear()
    assert run(tmp_path / "run", 8) == want


def test_what_follows_a_step_is_made_again_if_it_was_stopped(tmp_path):
    """Mutation: the state not saved if after_step is stopped; after_step not called for the restored state."""
    made = []

    def evaluate(done, state):
        if done == 3 and not made:
            made.append("begun")
            os.kill(os.getpid(), signal.SIGTERM)
            stopping.stop_if_requested("an evaluation")
        if done == 3:
            made.append(state["w"].tolist())

    want = run(tmp_path / "unbroken", 3)
    with pytest.raises(stopping.Stopped):
        run(tmp_path / "run", after_step=evaluate)
    stopping._received.clear()
    run(tmp_path / "run", after_step=evaluate)
    assert made == ["begun", want]


def test_only_a_later_second_signal_ends_at_once(monkeypatch):
    """A scheduler's signal may arrive twice, directly and through the parent. Mutation: any second signal ends."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended == []
    monkeypatch.setattr(stopping, "_since", time.monotonic() - stopping.REPEAT_SECONDS - 0.1)
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [130]


def test_states_are_saved_by_time_too(monkeypatch):
    """With 10 s a step, every 7 steps or every minute: 6 steps. Mutation: minutes as seconds; the time not reset."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saves, steps = loop.SaveTimes(0, 7, 1.0), []
    for done in range(1, 30):
        clock[0] += 10
        if saves.due(done):
            saves.saved(done)
            steps.append(done)
    assert steps == [6, 7, 13, 14, 20, 21, 27, 28]
    saves = loop.SaveTimes(0, 7, math.inf)
    assert [done for done in range(1, 30) if saves.due(done)] == [7, 14, 21, 28]
