"""Runs of RL that train LoRA factors, on the toy model of test_reinforce."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from tests.training import test_reinforce as toy
from warp_jax import merging, trees
from warp_jax.diagnosis import replay
from warp_jax.models import freezing, lora
from warp_jax.parallel import meshes
from warp_jax.settings.groups import Bema, Lora
from warp_jax.training import anchors, loop, optimizers, reinforce
from warp_jax.types import Rollout

LORA = Lora(rank=3, alpha=6.0)  # twice A B
RATE = 0.3
PRODUCTS = {"q": "ldr,lrhk->ldhk", "k": "ldr,lrhk->ldhk", "v": "ldr,lrhk->ldhk", "o": "lhkr,lrd->lhkd"}


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _start(mesh=toy.ONE_DEVICE):
    return freezing.split(toy._params(mesh), "layers/", "/kernel$")


@functools.lru_cache
def _trainer(mesh=toy.ONE_DEVICE, anchor="ema", **rl):
    trained, frozen = _start(mesh)
    changed = toy.SETTINGS.rl.model_copy(update=rl)
    rule = anchors.bema(Bema()) if anchor == "bema" else anchors.ema(RATE)
    rule = reinforce.Rule(
        score_fn=toy._score_fn(toy._apply_fn(mesh)),
        optimizer=optimizers.make_optimizer(toy.SETTINGS.rl, toy.SETTINGS.adam),
        rl=changed,
        anchor=rule,
        stop_ids=toy.SAMPLING.stop_ids,
        lora=LORA,
    )
    return reinforce.Trainer(
        programs=reinforce.make_programs(mesh, trained, rule),
        sampler=toy._sampler(mesh),
        reward_fn=toy.REWARD,
        train_prompts=toy._prompt_batch(),
        frozen_params=frozen,
        mesh=mesh,
        rl=changed,
        seed=7,
        lora=LORA,
    )


def _run(directory, trainer=None, *, run=2, num_steps=4, stop_after=None):
    """The result of a run, the states after its steps, and their metrics."""
    states, metrics = [], []

    def after_step(step, state):
        states.append(jax.device_get(state))
        if step == stop_after:
            raise KeyboardInterrupt

    trainer = trainer or _trainer()
    schedule = loop.Schedule(num_steps, directory, 2, lambda step, values: metrics.append(values), after_step)
    final = reinforce.run_policy(trainer, _start(trainer.mesh)[0], iteration=1, run=run, schedule=schedule)
    return jax.device_get(final), states, [m for m in metrics if m]


def _exact(factors):
    """The weights start + 2 A B in float64, by name."""
    start, leaves, weights = flatten_dict(_start()[0], sep="/"), flatten_dict(factors, sep="/"), {}
    for name, kernel in start.items():
        a, b = (np.asarray(leaves[f"{name}/{kind}"], np.float64) for kind in "ab")
        product = PRODUCTS.get(name.split("/")[2], "ldr,lrf->ldf")
        weights[name] = np.asarray(kernel, np.float64) + 2 * np.einsum(product, a, b)
    return weights


def _assert_near(found, exact, atol):
    for name, leaf in flatten_dict(found, sep="/").items():
        np.testing.assert_allclose(leaf, exact[name], rtol=0, atol=atol, err_msg=name)


def _furthest(found, exact):
    return max(np.abs(np.asarray(leaf) - exact[name]).max() for name, leaf in flatten_dict(found, sep="/").items())


def _mean(first, second, rate):
    return jax.tree.map(lambda x, y: (1 - rate) * x + rate * y, first, second)


def test_a_run_begins_with_the_weights_of_its_start():
    """Fails when the first policy or anchor is not the start to the bit, runs share A, or A has the key of a step."""
    trainer, (start, _) = _trainer(), _start()
    keys = [reinforce.make_run(trainer, start, *place).key for place in ((1, 1), (1, 2), (2, 1))]
    states = [trainer.programs.init(start, key) for key in keys]
    for state in states:
        jax.tree.map(np.testing.assert_array_equal, trainer.programs.weights(state.params, start), start)
        jax.tree.map(np.testing.assert_array_equal, state.anchor_params, start)
    first, *others = (state.params["layers"]["mlp"]["up"]["kernel"]["a"] for state in states)
    assert all(np.abs(first - other).mean() > 0.1 for other in others)
    step_0 = lora.init(jax.random.fold_in(keys[0], 0), start, LORA.rank)
    assert not np.allclose(first, step_0["layers"]["mlp"]["up"]["kernel"]["a"])


def test_moments_are_those_of_the_factors():
    """Fails when the optimiser holds moments of whole weights, or a weight outside the targets is trained."""
    state = _trainer().programs.init(_start()[0])
    attention, mlp = 4 * 3 * (32 + 32), 3 * 3 * (32 + 64)  # rank 3 times inputs and outputs: q, k, v, o; gate, up, down
    elements = 2 * (attention + mlp)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == elements
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * elements
    assert sum(leaf.size for leaf in jax.tree.leaves(state.anchor_params)) == 2 * (4 * 32 * 32 + 3 * 32 * 64)


def test_the_anchor_is_the_average_of_whole_weights(tmp_path):
    """Fails when the anchor averages factors, moves by another rate, or averages the weights before the step."""
    _, states, _ = _run(tmp_path)
    anchor = {name: np.asarray(leaf, np.float64) for name, leaf in flatten_dict(_start()[0], sep="/").items()}
    factors = _trainer().programs.init(_start()[0], reinforce.make_run(_trainer(), _start()[0], 1, 2).key).params
    for state in states:
        weights = _exact(state.params)
        anchor = {name: (1 - RATE) * anchor[name] + RATE * weights[name] for name in anchor}
        factors = _mean(factors, state.params, RATE)
        _assert_near(state.anchor_params, anchor, 1e-6)
    assert max(np.abs(_exact(factors)[name] - anchor[name]).max() for name in anchor) > 1e-4


def _slerp(start, first, second, weight):
    """SLERP of task vectors with one angle per layer, in float64."""
    merged = {name: leaf.copy() for name, leaf in start.items()}
    for layer in range(2):
        deltas = [{name: policy[name][layer] - start[name][layer] for name in start} for policy in (first, second)]
        vectors = [np.concatenate([delta[name].reshape(-1) for name in sorted(start)]) for delta in deltas]
        cosine = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
        angle = np.arccos(cosine)
        assert 0.3 < angle < 3
        for name in start:
            merged[name][layer] += (
                np.sin((1 - weight) * angle) * deltas[0][name] + np.sin(weight * angle) * deltas[1][name]
            ) / np.sin(angle)
    return merged


def test_a_merge_of_runs_is_that_of_their_whole_weights(tmp_path):
    """Fails when a run returns its factors, the anchor or the start, or a merge is of the factors."""
    start = _start()[0]
    policies, factors, exact = [], [], []
    for run in (1, 2):
        final, states, _ = _run(tmp_path / str(run), run=run)
        policies.append(final)
        factors.append(states[-1].params)
        exact.append(_exact(states[-1].params))
        _assert_near(final, exact[-1], 1e-6)
    before = {name: np.asarray(leaf, np.float64) for name, leaf in flatten_dict(start, sep="/").items()}
    spherical = _slerp(before, *exact, 0.2)
    want = {name: before[name] + 0.3 * (spherical[name] - before[name]) for name in before}
    _assert_near(merging.slerp_liti(start, policies, 0.3, weights=[0.2]), want, 1e-6)
    linear = {name: 0.8 * exact[0][name] + 0.2 * exact[1][name] for name in before}
    _assert_near(merging.lerp(start, policies, weights=[0.8, 0.2]), linear, 1e-6)
    wrong = _exact(_mean(*factors, 0.2))
    assert max(np.abs(wrong[name] - linear[name]).max() for name in linear) > 1e-3


def _toy_score(params, rollout):
    """Log-probabilities of 4 completions of 3 tokens, [4, 3], which depend on two stacked kernels and a bias."""
    o, up = params["layers"]["attention"]["o"]["kernel"], params["layers"]["mlp"]["up"]["kernel"]
    features = jnp.sin(jnp.arange(4 * 3 * 6.0)).reshape(4, 3, 6)
    hidden = jnp.tanh(features @ o[0].reshape(6, 5)) + jnp.sin(features @ o[1].reshape(6, 5))
    return jax.nn.log_softmax(jnp.tanh(hidden @ up[0]) + jnp.sin(hidden @ up[1]) + params["bias"])[..., 1]


TOY_SHAPES = {"layers": {"attention": {"o": {"kernel": (2, 3, 2, 5)}}, "mlp": {"up": {"kernel": (2, 5, 4)}}}}


def test_the_gradient_is_that_of_whole_weights_in_float64():
    """Fails when the scale is missing, the gradient is taken at the start, or B's is that of A."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        draw = functools.partial(jax.tree.map, lambda x: jnp.asarray(rng.normal(size=x)))
        start = draw(TOY_SHAPES, is_leaf=lambda x: isinstance(x, tuple))
        frozen = {"bias": jnp.asarray(rng.normal(size=4))}
        rl = toy.SETTINGS.rl.model_copy(update={"advantage": "none"})
        rule = reinforce.Rule(_toy_score, optax.sgd(0.1), rl, anchors.ema(RATE), lora=LORA)
        state = reinforce.init_state(rule, start)
        state = state._replace(params=jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), state.params))
        ids, mask = jnp.zeros((4, 3), jnp.int32), jnp.asarray(rng.random((4, 3)) < 0.8)
        rollout = Rollout(ids, mask, jnp.arange(4), ids, mask, jnp.zeros((4, 3)))
        rewards = jnp.asarray(rng.normal(size=4))
        _, _, trace = reinforce.policy_update(rule, state, trees.join(start, frozen), rollout, rewards)

        def loss(weights):
            logps = _toy_score(trees.join(weights, frozen), rollout)
            return -jnp.mean(jnp.where(mask, logps * trace.advantages, 0.0).sum(axis=1))

        o, up = state.params["layers"]["attention"]["o"]["kernel"], state.params["layers"]["mlp"]["up"]["kernel"]
        slopes = jax.grad(loss)(
            {
                "layers": {
                    "attention": {"o": {"kernel": _at(start, "attention", "o") + 2 * _product("lhkr,lrd->lhkd", o)}},
                    "mlp": {"up": {"kernel": _at(start, "mlp", "up") + 2 * _product("ldr,lrf->ldf", up)}},
                }
            }
        )
        slope, found = _at(slopes, "attention", "o"), _at(trace.gradient, "attention", "o")
        np.testing.assert_allclose(found["a"], 2 * np.einsum("lhkd,lrd->lhkr", slope, o["b"]), rtol=1e-9)
        np.testing.assert_allclose(found["b"], 2 * np.einsum("lhkr,lhkd->lrd", o["a"], slope), rtol=1e-9)
        slope, found = _at(slopes, "mlp", "up"), _at(trace.gradient, "mlp", "up")
        np.testing.assert_allclose(found["a"], 2 * np.einsum("ldf,lrf->ldr", slope, up["b"]), rtol=1e-9)
        np.testing.assert_allclose(found["b"], 2 * np.einsum("ldr,ldf->lrf", up["a"], slope), rtol=1e-9)


def _at(tree, module, name):
    return tree["layers"][module][name]["kernel"]


def _product(axes, factors):
    return np.einsum(axes, factors["a"], factors["b"])


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    """Fails when factors, moments or anchor are not restored, or A is drawn again."""
    unbroken, *_ = _run(tmp_path / "a", num_steps=6)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "b", num_steps=6, stop_after=3)
    resumed, _, metrics = _run(tmp_path / "b", num_steps=6)
    assert len(metrics) == 4
    assert toy._distance(unbroken, resumed) == 0.0
    assert toy._distance(unbroken, _start()[0]) > 1.0


def test_microbatches_change_nothing(tmp_path):
    """Fails when the gradients of a part are those of another point, or are summed instead of averaged."""
    one, _, first = _run(tmp_path / "one", num_steps=1)
    two, _, second = _run(tmp_path / "two", _trainer(num_microbatches=2), num_steps=1)
    assert second[0] == pytest.approx(first[0], rel=1e-4, abs=5e-6)
    assert toy._distance(one, two) < 1e-2 * toy._distance(one, _start()[0])


SETTINGS = [
    {"updates_per_rollout": 3},
    {"anchor": "bema"},
    {"kl_schedule": "adaptive", "kl_target": 0.1},
    {"kl_in": "loss", "kl_estimator": "k3"},
    {"num_microbatches": 2, "whiten": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_other_settings_of_a_run(settings, tmp_path):
    """Fails when a setting scores factors as weights, or the anchor leaves the policy: it moves towards it."""
    final, states, metrics = _run(tmp_path, _trainer(**settings), num_steps=3)
    assert len(metrics) == 3
    _assert_near(final, _exact(states[-1].params), 1e-6)
    moved = _trainer(**settings).programs.init(_start()[0]).params
    assert toy._distance(moved, states[-1].params) > 1.0
    anchor = states[-1].anchor_params["anchor"] if settings.get("anchor") else states[-1].anchor_params
    far = _furthest(final, {name: np.asarray(x) for name, x in flatten_dict(_start()[0], sep="/").items()})
    assert 0 < _furthest(anchor, _exact(states[-1].params)) < far


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path):
    """Fails when factors are split along other axes than their kernel, or the rank is."""
    many, _, metrics_many = _run(tmp_path / "many", _trainer(meshes.make_mesh((2, 2, 2))), num_steps=1)
    one, _, metrics_one = _run(tmp_path / "one", num_steps=1)
    assert metrics_many[0] == pytest.approx(metrics_one[0], rel=1e-5, abs=5e-6)
    assert toy._distance(one, many) < 1e-3 * toy._distance(one, _start()[0])


def test_a_step_is_replayed(tmp_path):
    """Fails when a replay starts from other factors, or repeats the step from other weights."""
    trainer, start = _trainer(), _start()[0]
    _, states, _ = _run(tmp_path, num_steps=4)
    run = reinforce.make_run(trainer, start, 1, 2)
    for step in (0, 3):
        found, _ = replay.rl_quantities(trainer, run, start, tmp_path / ("nothing" if step == 0 else ""), step)
        _assert_near(found["new policy"], _exact(states[step].params), 1e-6)
    assert set(found["weights"]["layers"]["mlp"]["up"]["kernel"]) == {"a", "b"}


def test_factors_decay():
    """Fails when weight decay leaves the factors out: it pulls the policy to the start of its run."""
    factors = _trainer().programs.init(_start()[0]).params
    assert all(jax.tree.leaves(optimizers._decays(factors)))
