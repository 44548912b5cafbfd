"""Numbers that are not finite: the step is named, nothing of it is saved, a replay finds the place, and training goes
on bit-for-bit when the fault is gone."""

import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import commands, poisoned_main
from tests.settings_of import settings_of
from warp_jax.data import batches
from warp_jax.diagnosis import replay
from warp_jax.parallel import meshes, stopping
from warp_jax.storage import checkpoint
from warp_jax.training import anchors, loop, metric_writer, reinforce, supervised
from warp_jax.types import GuardError, RewardError, Rewards, Rollout

VOCABULARY, LENGTH, BATCH, STEPS = 5, 3, 8, 7
MESH = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
START = {"embed": {"embedding": jnp.linspace(0.0, 1.0, VOCABULARY**2).reshape(VOCABULARY, VOCABULARY)}}
SETTINGS = settings_of({"rl.batch_size": BATCH, "rl.samples_per_prompt": 2})
PROMPTS = batches.left_pad([np.array([i % VOCABULARY], np.int32) for i in range(20)], 1, pad_id=0)


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _score(params, rollout):
    """A model of order 1: the last token decides on the next."""
    before = jnp.concatenate([rollout.prompt_ids[:, -1:], rollout.completion_ids[:, :-1]], axis=1)
    logps = jax.nn.log_softmax(params["embed"]["embedding"])[before, rollout.completion_ids]
    return jnp.where(rollout.completion_mask, logps, 0.0)


@functools.partial(jax.jit, static_argnums=3)
def _sample(params, prompts, key, copies):
    prompts = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), prompts)
    last, drawn = prompts.prompt_ids[:, -1], []
    for number in range(LENGTH):
        last = jax.random.categorical(jax.random.fold_in(key, number), params["embed"]["embedding"][last]).astype(
            jnp.int32
        )
        drawn.append(last)
    ids = jnp.stack(drawn, axis=1)
    rollout = Rollout(*prompts, ids, jnp.ones_like(ids, bool), jnp.zeros(ids.shape))
    return rollout._replace(per_token_logps=_score(params, rollout))


def _reward(rollout):
    value = (rollout.completion_ids == 3).sum(axis=1).astype(jnp.float32)
    return Rewards(value, {"threes": value})


def _table(params):
    return np.asarray(params["embed"]["embedding"])


def _trainer():
    rule = reinforce.Rule(_score, optax.adam(0.05), SETTINGS.rl, anchors.ema(0.1), stop_ids=(3,))
    programs = reinforce.make_programs(MESH, START, rule)
    return reinforce.Trainer(programs, _sample, _reward, PROMPTS, {}, MESH, SETTINGS.rl, seed=1)


_clean = functools.cache(_trainer)


def _run(directory, trainer):
    name = "iteration 1 run 2"
    schedule = loop.Schedule(
        STEPS, directory, checkpoint_every=2, on_step=lambda *args: None, name=name, split="split 'prompts'"
    )
    return reinforce.run_policy(trainer, START, iteration=1, run=2, schedule=schedule)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return _table(_run(directory, _clean())), (directory / metric_writer.FILE).read_text()


def _assert_finite(directory):
    """All that is saved is finite."""
    like = checkpoint.abstract(_clean().programs.init(START))
    for path in (directory / "state").glob("*"):
        state = checkpoint.restore_params(path, like)
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state)), path
    for row in metric_writer.read_rows(directory / metric_writer.FILE):
        assert all(map(math.isfinite, row.values()))


def _found(directory, trainer, step):
    """Name of the quantity that a replay finds first, its line, and the rows of the data."""
    run = reinforce.make_run(trainer, START, 1, 2)
    quantities, rollout = replay.rl_quantities(trainer, run, START, directory, step)
    found = replay.Step(quantities, "split 'prompts'", np.asarray(rollout.example_ids), ["text"] * BATCH)
    text, broken = replay.describe(found)
    first = text.partition("not finite first: ")[2].partition("\n")[0]
    return first, next((line for line in text.splitlines() if first and line.startswith(f"{first} ")), ""), broken


FAULTS = {  # place: the metric that shows it, and the quantity that a replay names
    "reward": ("reward is nan", "reward/threes"),
    "sampler": ("drift/mean is nan", "sampler logps"),
    "gradient": ("grad_norm is nan", "gradient"),
    "weights": ("param_norm is nan", "new policy"),
}


@pytest.mark.parametrize(("place", "step"), [("reward", 0), ("sampler", 3), ("gradient", STEPS - 1), ("weights", 4)])
def test_a_nan_stops_its_step_and_the_run_goes_on_without_it(place, step, undisturbed, tmp_path):
    """Fails when one of the checks (reward, sampler's log-probs, gradient, new weights) is left out, the step after the
    fault is named, a state with the NaN is saved, the rows are others, or the replay starts from another state.
    """
    metric, quantity = FAULTS[place]
    with pytest.MonkeyPatch.context() as patched:
        for patch in poisoned_main.poison(place, "iteration_1/run_2", step):
            patched.setattr(*patch)
        trainer = _trainer()
        with pytest.raises(FloatingPointError, match=rf"^iteration 1 run 2 step {step}: .*{metric}") as error:
            _run(tmp_path, trainer)
        _assert_finite(tmp_path)
        rows = batches.epoch_rows(20, BATCH // 2, step, seed=1, stream="iteration 1 run 2")
        bad = [int(rows[poisoned_main.ROW // 2])] if place in ("reward", "sampler") else []
        content = json.loads((tmp_path / f"replay_{step}.json").read_text())
        assert (content["step"], content["rows"], content["saved_step"]) == (step, bad, step // 2 * 2)
        assert (f"(row {bad[0]} of split 'prompts')" in str(error.value)) if bad else "rows" not in str(error.value)
        before = sorted(tmp_path.rglob("*"))
        first, line, broken = _found(tmp_path, trainer, step)
        assert (first, broken) == (quantity, True)
        assert (f"row {bad[0]}: nan" if bad else "embed/embedding: ") in line
        assert sorted(tmp_path.rglob("*")) == before
    trainer = _clean()
    assert _found(tmp_path, trainer, step) == ("", "", False)
    final, log = undisturbed
    np.testing.assert_array_equal(_table(_run(tmp_path, trainer)), final)
    assert (tmp_path / metric_writer.FILE).read_text() == log


def test_a_saved_state_with_a_nan_is_named_by_the_replay(undisturbed, tmp_path):
    """Fails when the weights before the step are not looked at first, or the anchor's are taken for the policy's."""
    trainer = _clean()
    with pytest.MonkeyPatch.context() as patched:
        for patch in poisoned_main.poison("reward", "iteration_1/run_2", 4):
            patched.setattr(*patch)
        with pytest.raises(FloatingPointError):
            _run(tmp_path, _trainer())
    path = tmp_path / "state" / "4"
    shutil.copytree(path, tmp_path / "good")
    state = checkpoint.restore_params(path, checkpoint.abstract(trainer.programs.init(START)))
    for quantity, field in (("weights", "params"), ("anchor weights", "anchor_params")):
        shutil.rmtree(path)
        checkpoint.save_params(path, state._replace(**{field: poisoned_main.spoiled(getattr(state, field))}))
        with pytest.raises(FloatingPointError, match=r"^iteration 1 run 2 step 4: "):
            _run(tmp_path, trainer)
        assert _found(tmp_path, trainer, 4)[0] == quantity
    shutil.rmtree(path)
    (tmp_path / "good").rename(path)
    np.testing.assert_array_equal(_table(_run(tmp_path, trainer)), undisturbed[0])


def test_weights_that_are_not_finite_after_a_finite_gradient_are_not_saved(tmp_path):
    """Fails when the norm of the new weights is no metric: Adam divides 0 by 0 where eps is too small for float32."""
    start = {"final_norm": {"scale": jnp.ones(2)}, "score": {"kernel": jnp.ones((3, 1))}}  # the second is unused

    def loss_fn(params, batch):
        loss = (params["final_norm"]["scale"] * batch["x"]).sum()
        return loss, {"loss": loss}

    task = supervised.Task(loss_fn, start, {}, lambda step: {"x": np.ones(2, np.float32)}, lambda number: {})
    schedule = loop.Schedule(3, tmp_path, 1, lambda *args: None, name="sft")
    with pytest.raises(FloatingPointError, match=r"^sft step 0: param_norm is nan, want finite; nothing"):
        supervised.fit(task, optax.adam(0.1, eps=1e-50), MESH, schedule)
    assert list((tmp_path / "state").glob("*")) == []


def _loop(directory, *, bad_step=1, after_step=lambda done, state: None, step_error=None, **options):
    """A loop of 4 steps whose metrics of one step are not finite."""

    def step_fn(state, step):
        if step == bad_step + 1 and step_error:
            raise step_error
        value = math.nan if step == bad_step else 0.0
        return {"w": state["w"] + value}, {"loss": value}

    schedule = loop.Schedule(
        **{"num_steps": 4, "directory": directory, "checkpoint_every": 100, "on_step": lambda *args: None} | options,
        after_step=after_step,
    )
    return loop.run_steps(step_fn, lambda: {"w": jnp.zeros(2)}, schedule)


def _raise(error):
    raise error


WAYS = {  # ways in which a state is saved
    "every": {"checkpoint_every": 2},
    "minutes": {"checkpoint_minutes": 1e-9},
    "reward error": {"step_error": RewardError("f: raised KeyError")},
    "guard": {"after_step": lambda done, state: done == 2 and _raise(GuardError("limit"))},
    "stopped": {"after_step": lambda done, state: done == 2 and _raise(stopping.Stopped("run_2"))},
    "last": {"num_steps": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_saving_saves_a_bad_state(way, tmp_path):
    """Fails when a save does not read the metrics of its last step first."""
    with pytest.raises(FloatingPointError, match=r"^training step 1: loss is nan"):
        _loop(tmp_path, **WAYS[way])
    states = [path.name for path in (tmp_path / "state").glob("*")]
    assert set(states) <= {"1"}
    assert [row["step"] for row in metric_writer.read_rows(tmp_path / metric_writer.FILE)] == [0]


def test_a_policy_is_evaluated_only_if_its_step_was_finite(tmp_path):
    """Fails when the metrics of an evaluated step are read after the evaluation, which is saved."""
    seen = []
    with pytest.raises(FloatingPointError, match="step 1: loss is nan"):
        _loop(tmp_path, after_step=lambda done, state: seen.append(done), checked={2})
    assert seen == [1]


def test_a_guard_loses_no_step(tmp_path):
    """Fails when the state is not saved, or is that of another step."""
    stop = {"after_step": lambda done, state: done == 3 and _raise(GuardError("limit"))}
    for _ in range(2):  # it stands when the job is started again
        with pytest.raises(GuardError, match="limit"):
            _loop(tmp_path, bad_step=9, **stop)
        assert [path.name for path in (tmp_path / "state").glob("*")] == ["3"]


def test_a_loop_ends_where_it_is_told(tmp_path):
    """Fails when steps after the end are made, also by a job that starts again from the state at the end."""
    seen = []
    end = {"after_step": lambda done, state: seen.append(done) or done == 3}
    for wanted in ([1, 2, 3], [3]):
        _loop(tmp_path, bad_step=9, checkpoint_every=1, **end)
        assert seen == wanted
        seen.clear()
        if wanted[0] == 1:  # a save that was made before the loop ended, of that step
            _loop(tmp_path, bad_step=9, checkpoint_every=1, num_steps=3)
    rows = metric_writer.read_rows(tmp_path / metric_writer.FILE)
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_held_out_numbers_are_finite():
    """Fails when a summary with nan is written, which is no JSON."""
    task = supervised.Task(
        lambda params, batch: (0.0, {"loss": batch["x"][0]}),
        {},
        {},
        None,
        lambda n: {"x": np.full(1, [0.0, math.nan][n])},
    )
    assert supervised.held_out(task, {}, 1, MESH) == {"loss": 0.0}
    with pytest.raises(FloatingPointError, match="held out: loss is nan"):
        supervised.held_out(task, {}, 2, MESH)


@pytest.mark.slow
def test_the_whole_program_replays_a_step(tmp_path):
    """Fails when --replay starts the job, changes a file or finds another place, when an error is not one line, or when
    an exit code is not 2.
    """
    poisoned = [commands.sys.executable, "-m", "tests.poisoned_main", "gradient", "sft", "5"]
    job = [commands.TINY, f"--workdir={tmp_path / 'run'}"]
    ended = commands.run([*poisoned, *job])
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert (ended.returncode, len(lines), "Traceback" in ended.stderr) == (2, 1, False)
    assert lines[0].startswith(
        "error: sft step 5: grad_norm is nan, param_norm is nan, want finite; nothing after step 4"
    )
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    path = tmp_path / "run" / "sft" / "replay_5.json"
    assert f"--replay={path}" in lines[0]
    ended = commands.run([*poisoned, *job, f"--replay={path}"])
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (2, "not finite first: gradient"), ended.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
