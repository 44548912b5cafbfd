"""The flow of Algorithm 1, on policies whose merge is known by hand."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from warp_jax import warp
from warp_jax.evaluate import Evaluation

SFT = np.array([1.0, 2.0, 3.0, 4.0])
STEPS = {(1, 1): [2.0, 0, 0, 0], (1, 2): [0, 2.0, 0, 0], (2, 1): [0, 0, 3.0, 0], (2, 2): [0, 0, 0, 3.0]}


def _evaluation(value):
    values = np.full(3, value, np.float32)
    return Evaluation(values, values, values, values, np.array(1.0), values[:, None], values[:, None] > 0)


class _Progress:
    start_stage = end_stage = note = on_step = lambda *args, **kwargs: None


def _tree(vector):
    return {"layers": {"w": jnp.asarray(vector, jnp.float32)[None]}}


def _vector(tree):
    return np.asarray(tree["layers"]["w"][0])


@pytest.fixture
def job(monkeypatch):
    """Runs Algorithm 1 with policies that end at init + STEPS; returns its points, and the params it used."""

    def run(workdir, **settings):
        config = tiny.get_config()
        config.warp.update(settings)
        config.evaluation.every = 6
        config.front.etas = (0.3, 1.0)
        starts, measured = {}, {}

        def train_policy(init_params, *, iteration, run, num_steps, after_step, **_):
            starts[iteration, run] = _vector(init_params)
            policy = _tree(_vector(init_params) + STEPS[iteration, run])
            after_step(num_steps, types.SimpleNamespace(params=policy))
            return policy

        class Store:
            def __init__(self, *args):
                pass

            def get(self, name, make_params):
                measured.setdefault(name, _vector(make_params()))
                return _evaluation(0.0)

        monkeypatch.setattr(warp.train, "run_policy", train_policy)
        monkeypatch.setattr(warp, "EvaluationStore", Store)
        monkeypatch.setattr(warp, "_make_programs", lambda *args: None)
        monkeypatch.setattr(warp, "_make_evaluate", lambda *args: None)
        setup = types.SimpleNamespace(sft_params=_tree(SFT), train_reward_fn=None, train_prompts=None, mesh=None)
        points = warp.run_warp(config, setup, workdir, _Progress())
        return points, starts, measured

    return run


def test_every_step_of_algorithm_1(job, tmp_path):
    """Fails when iteration 2 starts from the merge, from SFT or towards SFT, when runs start apart, when the front
    goes from the iteration's init instead of SFT, or a merge is linear.
    """
    points, starts, measured = job(tmp_path, liti_rate=0.3)
    half = np.sqrt(0.5)  # at 90 degrees both slerp factors at weight 1/2
    merged_1 = SFT + 2 * half * np.array([1, 1, 0, 0])
    init_2 = SFT + 0.3 * (merged_1 - SFT)
    merged_2 = init_2 + 3 * half * np.array([0, 0, 1, 1])
    for (iteration, _), start in starts.items():
        np.testing.assert_allclose(start, SFT if iteration == 1 else init_2, rtol=1e-6)
    np.testing.assert_allclose(measured["merged_i1"], merged_1, rtol=1e-6)
    np.testing.assert_allclose(measured["merged_i2"], merged_2, rtol=1e-6)
    np.testing.assert_allclose(measured["liti_i2_e0.3"], SFT + 0.3 * (merged_2 - SFT), rtol=1e-6)
    np.testing.assert_allclose(measured["policy_i2_r2_s6"], init_2 + STEPS[2, 2], rtol=1e-6)
    assert [(p.stage, p.iteration, p.run) for p in points if p.stage != "liti"] == [
        ("sft", 0, 0),
        *(("policy", 1, 1), ("policy", 1, 2), ("merged", 1, 0)),
        *(("policy", 2, 1), ("policy", 2, 2), ("merged", 2, 0)),
    ]


def test_liti_rate_0_returns_to_init(job, tmp_path):
    """Fails when the rate weighs init: at 0 the second iteration starts where the first did."""
    _, starts, _ = job(tmp_path, liti_rate=0.0)
    np.testing.assert_array_equal(starts[2, 1], starts[1, 1])


def test_a_stored_run_is_not_trained_again(job, tmp_path):
    """Fails when a finished run or merge is made again."""
    job(tmp_path)
    points, starts, _ = job(tmp_path)
    assert starts == {}
    assert len(points) == 11


def test_the_lerp_baseline_is_the_mean(job, tmp_path):
    """Fails when warp.merge is not read."""
    _, _, measured = job(tmp_path, merge="lerp")
    np.testing.assert_allclose(measured["merged_i1"], SFT + np.array([1.0, 1.0, 0, 0]), rtol=1e-6)
