"""Which parts of a job compile programs."""

import jax
import pytest

from tests.settings_of import settings_of
from warp_jax import main, merging
from warp_jax.experiment import jobs
from warp_jax.training import reinforce, supervised

SMALL = {
    "sft.num_steps": 3,
    "reward_model.num_steps": 3,
    "warp.steps_per_iteration": (3, 3),
    "evaluation.every": 2,
    "front.etas": (0.5, 1.0),
}
COMPILING = {"inputs", "sft step 0", "reward_model step 0", "held out", "iteration 1 run 1 step 0", "merge 1"}


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


DIFFERENT = ({"rewards.length.weight": -0.5}, {"seed": 3})


@pytest.mark.parametrize("runs", [(), pytest.param(DIFFERENT, marks=pytest.mark.slow)], ids=["equal", "different"])
def test_a_job_compiles_each_program_once(tmp_path, monkeypatch, runs):
    """Fails when a step after the first, a later run, an evaluation or a later merge compiles anything: a static
    argument or a shape that changes, a function that is jitted anew, or an update for each run of equal settings."""
    jax.clear_caches()  # of other tests
    place, compiled, counts = "inputs", set(), {"merge": 0, "sft": 0}

    def at(module, name, label):
        function = getattr(module, name)

        def call(*args, **options):
            nonlocal place
            place = label(*args)
            return function(*args, **options)

        monkeypatch.setattr(module, name, call)

    def supervised_label(programs, task, mesh, state, step):
        counts["sft"] += step == 0
        return f"{'sft' if counts['sft'] == 1 else 'reward_model'} step {step}"

    def merge_label(*args):
        counts["merge"] += 1
        return f"merge {counts['merge']}"

    at(supervised, "train_step", supervised_label)
    at(supervised, "held_out", lambda *args: "held out")
    at(reinforce, "train_step", lambda trainer, run, state, step: f"{run.name} step {step}")
    at(merging, "gram", merge_label)  # begins a merge; the front follows

    def on_event(name, seconds, **about):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.add(place)

    settings = settings_of({**SMALL, "warp.runs": runs})
    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        jobs.run_part(settings, main.check(settings, tmp_path / "run"), tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)
    assert compiled == COMPILING
    assert place == "merge 2"
