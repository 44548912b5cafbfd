"""One run of RL on a toy model."""

import dataclasses
import functools
import shutil
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.settings_of import settings_of
from warp_jax import cli, trees
from warp_jax.data import batches
from warp_jax.generation import sampling
from warp_jax.models import apply, freezing, partitioning
from warp_jax.models.transformer import TransformerConfig, init_cache
from warp_jax.parallel import hosts, meshes
from warp_jax.rewards import reward_functions
from warp_jax.storage import checkpoint
from warp_jax.training import anchors, loop, metric_writer, optimizers, reinforce, scoring
from warp_jax.types import RewardError, Rollout

CONFIG = TransformerConfig(
    vocab_size=16, width=32, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, mlp_dim=64, qk_norm=True
)
SAMPLING = sampling.SamplingConfig(max_new_tokens=5, temperature=0.7, stop_ids=(2,), pad_id=0)
BATCH = 8
ONE_DEVICE = meshes.make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _apply_fn(mesh=None):
    return apply.make_apply_fn(CONFIG, mesh)


@functools.lru_cache
def _sampler(mesh):
    return sampling.make_sampler(
        mesh,
        _params(mesh),
        apply_fn=_apply_fn(mesh),
        make_cache=functools.partial(init_cache, CONFIG, mesh=mesh),
        dtype=CONFIG.dtype,
        config=SAMPLING,
    )


def _params(mesh):
    params = jax.jit(functools.partial(apply.init_params, CONFIG))(jax.random.key(0))
    return jax.device_put(params, partitioning.param_shardings(mesh, params))


RL = {"rl.batch_size": BATCH, "rl.samples_per_prompt": 2, "rl.learning_rate": 1e-2, "rl.warmup_steps": 0}
SETTINGS = settings_of({**RL, "adam.eps": 1e-5})


def _score_fn(apply_fn, copies=1):
    return functools.partial(scoring.per_token_logps, apply_fn, temperature=SAMPLING.temperature, copies=copies)


@functools.lru_cache
def _programs(mesh, ema_rate=0.01, **rl):
    """Compiled once for each mesh and setting."""
    settings = SETTINGS.rl.model_copy(update=rl)
    copies = reinforce.shared_samples(settings, mesh, settings.num_microbatches)
    rule = _rule(_score_fn(_apply_fn(mesh), copies), anchors.ema(ema_rate), **rl)
    return reinforce.make_programs(mesh, _params(mesh), rule)


def _rule(score_fn, anchor, **rl):
    optimizer = optimizers.make_optimizer(SETTINGS.rl, SETTINGS.adam)
    return reinforce.Rule(score_fn, optimizer, SETTINGS.rl.model_copy(update=rl), anchor, SAMPLING.stop_ids)


def _prompt_batch():
    rows = [np.array([1, *range(3, 3 + 1 + i % 4)], np.int32) for i in range(12)]
    return batches.left_pad(rows, 4, pad_id=0)


def _count_token(rollout):
    return ((rollout.completion_ids == 5) & rollout.completion_mask).sum(axis=1).astype(jnp.float32)


REWARD = reward_functions.weighted_sum({"fives": 2.0}, {"fives": _count_token})


def _run(directory, mesh=None, num_steps=4, *, stop_after=None, checkpoint_every=2, states=None, **settings):
    mesh = mesh or ONE_DEVICE
    params = _params(mesh)
    metrics = []

    def after_step(step, state):
        if states is not None:
            states.append(jax.device_get(state))
        if step == stop_after:
            raise KeyboardInterrupt

    trainer = reinforce.Trainer(
        programs=_programs(mesh, **settings),
        sampler=_sampler(mesh),
        reward_fn=REWARD,
        train_prompts=_prompt_batch(),
        frozen_params={},
        mesh=mesh,
        rl=SETTINGS.rl,
        seed=7,
    )
    schedule = loop.Schedule(
        num_steps, directory, checkpoint_every, lambda step, values: metrics.append(values), after_step
    )
    final = reinforce.run_policy(trainer, params, iteration=1, run=2, schedule=schedule)
    return jax.device_get(final), [m for m in metrics if m]


def _one_update(**settings):
    mesh = ONE_DEVICE
    params = _params(mesh)
    programs = _programs(mesh, **settings)
    state = programs.init(params)
    batch = batches.take(_prompt_batch(), np.repeat(np.arange(BATCH // 2), 2))
    rollout = _sampler(mesh)(state.params, meshes.put_batch(mesh, batch), jax.random.key(3))
    state, metrics = programs.update(state, {}, rollout, REWARD(rollout).total)
    return params, state, metrics, programs, rollout


def _distance(a, b):
    return float(
        sum(np.abs(np.asarray(x) - np.asarray(y)).sum() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    )


def test_one_step_moves_policy_and_anchor():
    """Fails when the update is dropped, the anchor is not moved, or the rate weighs the old weights."""
    init, state, metrics, *_ = _one_update(ema_rate=0.01)
    assert _distance(state.params, init) > 0
    expected = jax.tree.map(lambda a, b: 0.99 * np.asarray(a) + 0.01 * np.asarray(b), init, state.params)
    assert _distance(state.anchor_params, expected) / _distance(state.params, init) < 1e-4
    assert abs(float(metrics["anchor_kl"])) < 1e-6


def test_frozen_anchor_stays_at_init():
    """Fails when ema_rate 0 lets the anchor move: the SFT-anchor baseline would be another algorithm."""
    init, state, *_ = _one_update(ema_rate=0.0)
    assert _distance(state.anchor_params, init) == 0.0


def test_donation_leaves_init_alive_and_traces_once():
    """Fails when state and init share buffers, or a second step compiles again."""
    init, state, _, programs, rollout = _one_update()
    state, _ = programs.update(state, {}, rollout, REWARD(rollout).total)
    assert np.isfinite(_distance(init, init))
    assert programs.update._cache_size() == 1


def test_the_kl_is_that_to_the_anchor():
    """Fails when the reward's KL uses the current policy twice, or the sampler's log-probs unscaled by temperature."""
    _, state, _, programs, rollout = _one_update(ema_rate=0.0)
    score = functools.partial(scoring.per_token_logps, _apply_fn(), temperature=SAMPLING.temperature)
    ratio = score(state.params, rollout) - score(state.anchor_params, rollout)
    expected = float(jnp.where(rollout.completion_mask, ratio, 0.0).sum(1).mean())
    _, metrics = programs.update(state, {}, rollout, REWARD(rollout).total)
    assert abs(expected) > 1e-4
    assert float(metrics["anchor_kl"]) == pytest.approx(expected, rel=1e-4)


def test_the_kl_is_in_the_advantage():
    """Fails when advantages are of the raw reward, of the reward plus KL, or the group's own sample is in its mean."""
    settings = {"ema_rate": 0.0, "kl_coef": 3.0}
    _, state, _, programs, rollout = _one_update(**settings)
    raw = np.asarray(REWARD(rollout).total, np.float64)
    score = functools.partial(scoring.per_token_logps, _apply_fn(), temperature=SAMPLING.temperature)
    mask = np.asarray(rollout.completion_mask)
    ratio = np.where(mask, np.asarray(score(state.params, rollout) - score(state.anchor_params, rollout)), 0).sum(1)
    shaped = (raw - 3.0 * ratio).reshape(-1, 2)
    advantage = jnp.asarray((shaped - shaped[:, ::-1]).reshape(-1), jnp.float32)  # minus the other of the pair

    def loss(params):
        return -jnp.mean(advantage * jnp.where(mask, score(params, rollout), 0.0).sum(1))

    expected = optax.global_norm(jax.grad(loss)(state.params))
    assert np.ptp(3.0 * ratio) > 0.1
    _, metrics = programs.update(state, {}, rollout, REWARD(rollout).total)
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("parts", "advantage", "whiten"),
    [
        pytest.param(4, "none", False, marks=pytest.mark.slow),
        (4, "leave_one_out", False),
        pytest.param(8, "leave_one_out", False, marks=pytest.mark.slow),
        (2, "leave_one_out", True),
        (4, "batch_mean", False),
    ],
)
def test_microbatches_change_nothing(parts, advantage, whiten):
    """Fails when gradients are summed instead of averaged, a part is weighed alone though its advantages depend on
    others (8 parts of one row each, too), or the parts are joined in another order than that of the rewards.
    """
    after = []
    for number in (1, parts):
        settings = {"ema_rate": 0.0, "kl_coef": 20.0, "advantage": advantage, "whiten": whiten}
        init, state, _, programs, rollout = _one_update(num_microbatches=number, **settings)
        state, metrics = programs.update(state, {}, rollout, REWARD(rollout).total)  # the policy has left the anchor
        after.append(({k: float(v) for k, v in metrics.items() if k != loop.BAD_ROWS}, state.params))
    (metrics, whole), (metrics_of_parts, pieces) = after
    assert abs(metrics["anchor_kl"]) > 0.01
    # Adam and clipping hide a wrong scale of the gradient, its norm does not
    assert metrics_of_parts == pytest.approx(metrics, rel=2e-4, abs=1e-6)
    assert _distance(whole, pieces) < 2e-4 * _distance(whole, init)


@pytest.mark.parametrize(
    ("advantage", "whiten", "forwards"), [("leave_one_out", False, 2), ("none", False, 2), ("none", True, 3)]
)
def test_the_policy_is_scored_once(advantage, whiten, forwards):
    """Fails when the policy or the anchor is scored twice though no advantage needs the whole batch."""
    calls = []

    def score_fn(params, rollout):
        calls.append(rollout.completion_ids.shape)
        return _score_fn(_apply_fn())(params, rollout)

    rule = _rule(score_fn, anchors.ema(0.01), num_microbatches=2, advantage=advantage, whiten=whiten)
    params, *_, rollout = _one_update()
    update = functools.partial(reinforce.policy_update, rule)
    jax.make_jaxpr(update)(reinforce.init_state(rule, params), {}, rollout, jnp.ones(BATCH))
    assert len(calls) == forwards
    assert {rows for rows, _ in calls} == {BATCH // 2}


def test_the_importance_cap_is_used():
    """Fails when the cap is not handed down, or the policy's log-probs are taken for the sampler's."""
    norms = []
    for cap, offset in ((0.0, 0.3), (1.2, 0.3), (8.0, 0.3)):
        _, state, _, programs, rollout = _one_update(importance_cap=cap, advantage="none")
        logps = jnp.where(rollout.completion_mask, rollout.per_token_logps - offset, 0.0)
        _, metrics = programs.update(state, {}, rollout._replace(per_token_logps=logps), REWARD(rollout).total)
        norms.append(float(metrics["grad_norm"]))
        assert float(metrics["drift/mean"]) == pytest.approx(-offset, abs=0.1)
    assert norms[1] == pytest.approx(1.2 * norms[0], rel=1e-3)  # every ratio is above the cap
    assert norms[2] > 1.5 * norms[0]


def test_reward_rises(tmp_path):
    """Fails when the loss has the wrong sign, or rewards are paired with the wrong prompts."""
    _, metrics = _run(tmp_path, num_steps=40, checkpoint_every=100)
    assert np.mean([m["reward"] for m in metrics[-5:]]) > np.mean([m["reward"] for m in metrics[:5]]) + 1.0
    assert metrics[0]["reward"] == pytest.approx(2 * metrics[0]["reward/fives"])


def test_the_policy_is_returned_not_the_anchor(tmp_path):
    """Fails when the anchor is returned instead of the policy: only policies are merged."""
    states = []
    final, _ = _run(tmp_path, num_steps=2, states=states)
    assert _distance(final, states[-1].params) == 0.0
    assert _distance(final, states[-1].anchor_params) > 0.0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Fails when training continues after a nan, or the diverged policy is saved as finished."""
    values = iter([1.0, float("nan"), 1.0])
    with pytest.raises(FloatingPointError, match="step 1: loss is nan"):
        loop.run_steps(
            lambda state, step: (state, {"loss": next(values)}),
            lambda: {"w": jnp.zeros(2)},
            loop.Schedule(3, tmp_path, checkpoint_every=100, on_step=lambda *args: None),
        )


def test_a_failure_of_another_process_is_one_line(tmp_path, monkeypatch, capsys):
    """Fails when it ends in a traceback, or with another exit code than outside of the loop."""
    reason = "process 0 of 2 failed; its output has the reason"

    def step_fn(state, step):
        raise hosts.PeerError(reason)

    monkeypatch.setattr(hosts, "jax", types.SimpleNamespace(process_count=lambda: 2, process_index=lambda: 1))
    monkeypatch.setattr(cli, "end", sys.exit)
    schedule = loop.Schedule(3, tmp_path, checkpoint_every=100, on_step=lambda *args: None)
    with pytest.raises(SystemExit, match=str(cli.TRY_AGAIN)):
        loop.run_steps(step_fn, lambda: {"w": jnp.zeros(2)}, schedule)
    assert capsys.readouterr().err == f"error: {reason}\n"


def test_stop_and_resume_is_the_unbroken_run_to_the_bit(tmp_path):
    """Fails when anchor or moments are not restored, or random keys depend on more than the step."""
    unbroken, _ = _run(tmp_path / "a", num_steps=6)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "b", num_steps=6, stop_after=3)
    resumed, metrics = _run(tmp_path / "b", num_steps=6)
    assert len(metrics) < 6
    assert _distance(unbroken, resumed) == 0.0


def test_a_reward_that_fails_loses_no_step(tmp_path, monkeypatch):
    """Fails when the error does not say where it was raised, the steps since the last checkpoint are lost, or the state
    is saved after its buffers are reused.
    """
    unbroken, _ = _run(tmp_path / "a", num_steps=6, checkpoint_every=4)
    rewards = iter([REWARD, REWARD])

    def reward(rollout):
        for function in rewards:
            return function(rollout)
        raise RewardError("f: raised KeyError")

    with monkeypatch.context() as patched:
        patched.setattr(f"{__name__}.REWARD", reward)
        with pytest.raises(RewardError, match=r"^iteration 1 run 2 step 2: f: raised KeyError$"):
            _run(tmp_path / "b", num_steps=6, checkpoint_every=4)
    resumed, metrics = _run(tmp_path / "b", num_steps=6, checkpoint_every=4)
    assert len(metrics) == 4
    assert len(metric_writer.read_rows(tmp_path / "b" / "metrics.jsonl")) == 6
    assert _distance(unbroken, resumed) == 0.0


def test_no_room_for_two_states_is_asked(tmp_path, monkeypatch):
    """Fails when the first state is kept while the saved one is restored: twice the memory of training."""
    alive = []

    def init():
        state = {"w": jnp.full(3, 2.0)}
        alive.append(weakref.ref(state["w"]))
        return state

    def go_on(num_steps):
        return loop.run_steps(
            lambda state, step: ({"w": state["w"] + 1}, {"loss": 0.0}),
            init,
            loop.Schedule(num_steps, tmp_path, checkpoint_every=1, on_step=lambda *args: None),
        )

    go_on(1)
    restore = checkpoint._restore

    def restore_alone(path, like):
        assert alive[-1]() is None
        return restore(path, like)

    monkeypatch.setattr(checkpoint, "_restore", restore_alone)
    assert go_on(3)["w"].tolist() == [5.0] * 3


def _draws(directory, seed, iteration, run):
    """Prompts and keys of two steps of a run that trains nothing."""
    seen = []
    rollout = types.SimpleNamespace(_replace=lambda **changes: None)

    def sampler(params, batch, key, copies):
        assert copies == SETTINGS.rl.samples_per_prompt
        seen.append((np.asarray(batch.example_ids).tolist(), jax.random.key_data(key).tolist()))
        return rollout

    trainer = reinforce.Trainer(
        programs=loop.Programs(
            init=lambda params, key: types.SimpleNamespace(params=params), update=lambda state, *rest: (state, {})
        ),
        sampler=sampler,
        reward_fn=lambda rollout: types.SimpleNamespace(total=np.zeros(BATCH, np.float32), parts={}),
        train_prompts=_prompt_batch(),
        frozen_params={},
        mesh=ONE_DEVICE,
        rl=SETTINGS.rl,
        seed=seed,
    )
    schedule = loop.Schedule(2, directory, checkpoint_every=100, on_step=lambda *args: None)
    reinforce.run_policy(trainer, {"w": jnp.zeros(2)}, iteration=iteration, run=run, schedule=schedule)
    return seen


def test_every_run_and_step_has_prompts_and_noise_of_its_own(tmp_path):
    """Fails when runs, iterations or seeds share their prompts or keys: their policies would be too similar."""
    names = [(7, 1, 1), (7, 1, 2), (7, 2, 1), (8, 1, 1)]
    draws = [_draws(tmp_path / str(i), seed=s, iteration=n, run=r) for i, (s, n, r) in enumerate(names)]
    for part in (0, 1):
        found = [str(step[part]) for steps in draws for step in steps]
        assert len(set(found)) == len(found)
    assert _draws(tmp_path / "again", seed=7, iteration=1, run=2) == draws[1]


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 1, 1), (1, 8, 1), (1, 1, 8)))]
)
def test_eight_devices_equal_one(tmp_path, sizes):
    """Fails when a gradient or a baseline is taken per device, or a saved state needs the mesh that saved it.

    Every step starts from the state of one device: over steps as long as these, rounding grows tenfold a step.
    abs: float32 rounds log-probs of ten nats to 1e-6.
    """
    before = _params(ONE_DEVICE)
    rounding = BATCH * (4 + 5) * 2**-24  # float32, of a gradient summed over the tokens of all prompts and completions
    for step in range(3):
        if step:
            shutil.copytree(tmp_path / "one", tmp_path / f"many_{step}")
        many, metrics_many = _run(
            tmp_path / f"many_{step}", mesh=meshes.make_mesh(sizes), num_steps=step + 1, checkpoint_every=1
        )
        one, metrics_one = _run(tmp_path / "one", num_steps=step + 1, checkpoint_every=1)
        assert len(metrics_many) == len(metrics_one) == 1
        assert metrics_many[0] == pytest.approx(metrics_one[0], rel=1e-5, abs=5e-6)
        assert _distance(one, many) < rounding * _distance(one, before)
        before = one


def _partly_frozen(pattern):
    """One step of a model of which only `pattern` is trained; the trained leaves before and after, and the rollout."""
    groups = freezing.layer_groups(apply.param_shapes(CONFIG), pattern)
    config = dataclasses.replace(CONFIG, layer_groups=groups)
    params = freezing.restacked(
        _params(ONE_DEVICE), jax.jit(functools.partial(apply.init_params, config))(jax.random.key(1))
    )
    trained, frozen = freezing.split(params, pattern)
    apply_fn = apply.make_apply_fn(config)
    programs = reinforce.make_programs(
        ONE_DEVICE, trained, _rule(_score_fn(apply_fn), anchors.ema(0.01))._replace(optimizer=optax.sgd(0.1))
    )
    batch = batches.take(_prompt_batch(), np.repeat(np.arange(BATCH // 2), 2))
    batch = meshes.put_batch(ONE_DEVICE, batch)
    draw = functools.partial(sampling.sample, apply_fn, functools.partial(init_cache, config), config=SAMPLING)
    rollout = draw(params, batch, jax.random.key(3))
    state, _ = programs.update(programs.init(trained), frozen, rollout, REWARD(rollout).total)
    return trained, state, rollout


def test_frozen_weights_stay_and_cost_nothing():
    """Fails when a frozen leaf is updated or has an anchor, or a trained one does not move by its own gradient."""
    pattern = "layers/1/mlp/"
    trained, state, rollout = _partly_frozen(pattern)
    assert set(_names(trained)) == {f"layers_from_1/mlp/{x}/kernel" for x in ("gate", "up", "down")}
    assert set(_names(state.params)) == set(_names(state.anchor_params)) == set(_names(trained))

    def loss(params, apply_fn):
        logps = scoring.per_token_logps(apply_fn, params, rollout, SAMPLING.temperature)
        rewards_ = np.asarray(REWARD(rollout).total).reshape(-1, 2)
        advantage = jnp.asarray((rewards_ - rewards_[:, ::-1]).reshape(-1), jnp.float32)
        return -jnp.mean(advantage * jnp.where(rollout.completion_mask, logps, 0.0).sum(1))

    whole = jax.grad(loss)(_params(ONE_DEVICE), _apply_fn())
    for name, leaf in _names(state.params).items():
        expected = -0.1 * np.asarray(_names(whole)[name.replace("layers_from_1", "layers")])[1:]
        moved = np.asarray(leaf) - np.asarray(_names(trained)[name])
        assert np.abs(expected).max() > 1e-5
        np.testing.assert_allclose(moved, expected, atol=2e-3 * np.abs(expected).max())


def _names(tree):
    return {trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_an_update_rounds_every_bfloat16_value():
    """Fails when XLA may keep more digits in the update than bfloat16 has: policy and anchor, whose passes it fuses in
    other ways, would differ by .02 nats a token in a large model.
    """
    config = dataclasses.replace(CONFIG, num_layers=4, width=64, dtype="bfloat16", remat="dots")
    params = jax.tree.map(lambda x: x * 2, apply.init_params(config, jax.random.key(0)))
    score_fn = _score_fn(apply.make_apply_fn(config))
    programs = reinforce.make_programs(ONE_DEVICE, params, _rule(score_fn, anchors.ema(0.01)))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, 16, (2, BATCH, 5), np.int32), np.ones((BATCH, 5), bool)
    rollout = Rollout(ids[0], mask, np.arange(BATCH), ids[1], mask, np.zeros(mask.shape, np.float32))
    found = programs.trace(programs.init(params), {}, rollout, jnp.ones(BATCH)).policy_logps
    rounded = jax.jit(score_fn, compiler_options={"xla_allow_excess_precision": False})(params, rollout)
    kept = jax.jit(score_fn, compiler_options={"xla_allow_excess_precision": True})(params, rollout)
    np.testing.assert_allclose(found, rounded, atol=1e-6)
    assert float(jnp.abs(kept - rounded).max()) > 1e-3
