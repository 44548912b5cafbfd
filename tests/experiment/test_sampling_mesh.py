"""Sampling on another split of the devices than training."""

import jax
import numpy as np
import pytest

from tests.settings_of import settings_of
from warp_jax.experiment import architecture, programs
from warp_jax.generation import sampling
from warp_jax.models import apply
from warp_jax.parallel import meshes
from warp_jax.types import PromptBatch

MESH = meshes.make_mesh((1, 8, 1))


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Overrides the strict one of conftest.py: optax raises a float to an integer power."""


def _step(tensor):
    """One step of RL on eight devices, of which `tensor` share the weights while sampling."""
    settings = settings_of({"sampling.tensor": tensor})
    model = architecture.policy_config(settings.model, settings.vocab_size)
    params = apply.random_params(model, MESH, 0)
    made = programs.make_programs(settings, MESH, model, trained=params, frozen={}, stop_ids=(2,), pad_id=0)
    prompts = np.arange(5, 37, dtype=np.int32).reshape(8, 4)
    batch = meshes.put_batch(MESH, PromptBatch(prompts, prompts > 0, np.arange(8, dtype=np.int32)))
    rollout = made.sampler(params, batch, jax.random.key(0))
    rewards = meshes.put_batch(MESH, np.arange(8, dtype=np.float32))
    train = made.train[0]
    state, metrics = train.update(train.init(params), {}, rollout, rewards)
    kl = made.kl_to_sft(state.params, params, {}, rollout)
    return made.sampler.lay_out(params)["layers"]["mlp"]["up"]["kernel"], rollout, state, metrics, kl


@pytest.mark.slow
def test_sampling_may_split_the_weights_more_than_training():
    """Fails when the copy is split like the policy, or an update or evaluation refuses a rollout of another mesh."""
    (whole, rollout, state, metrics, kl), (halves, *split) = _step(0), _step(2)
    assert whole.sharding.shard_shape(whole.shape) == whole.shape
    assert halves.sharding.shard_shape(whole.shape) == (*whole.shape[:-1], whole.shape[-1] // 2)
    assert rollout.completion_mask.any()
    np.testing.assert_array_equal(rollout.completion_ids, split[0].completion_ids)
    for one, two in zip(*map(jax.tree.leaves, ((rollout, state, metrics, kl), split)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    for leaf, other in zip(*map(jax.tree.leaves, (state, split[1])), strict=True):
        assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)


def test_a_copy_is_made_when_the_previous_one_is_no_longer_used(monkeypatch):
    """Fails when a copy is made while a rollout from the previous one may run: memory would hold both. The policy is
    ready only after the update that read that rollout.
    """
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    config, params = sampling.SamplingConfig(2, 1.0, (), 0), {"embed": {"embedding": jax.numpy.ones((4, 2))}}
    mesh = meshes.make_mesh((1, 1, 1), jax.devices()[:1])
    for dtype in ("float32", "bfloat16"):
        options = {"apply_fn": None, "make_cache": None, "dtype": dtype, "config": config}
        copy = sampling.make_sampler(mesh, params, **options).lay_out(params)
        assert copy["embed"]["embedding"].dtype == dtype
        assert (copy["embed"]["embedding"] is params["embed"]["embedding"]) == (dtype == "float32")
        assert waited == ([] if dtype == "float32" else [params])


def test_the_mesh_for_sampling_keeps_the_order_of_the_devices():
    """Fails when devices are permuted, which XLA refuses in one program, or another axis than fsdp shrinks."""
    mesh = meshes.make_mesh((1, 4, 2))
    other = meshes.regroup(mesh, 4)
    assert other.axis_names == mesh.axis_names
    assert other.devices.shape == (1, 2, 4)
    assert list(other.devices.flat) == list(mesh.devices.flat)
    assert meshes.regroup(mesh, 0) is mesh


@pytest.mark.parametrize("tensor", [1, 3, 8])
def test_a_mesh_for_sampling_that_does_not_exist(tensor):
    """Fails with a traceback of numpy, or when the batch would be split over more devices than in training."""
    with pytest.raises(ValueError, match=rf"sampling.tensor: got {tensor}, want 0, or a multiple of 2 that divides 4"):
        meshes.regroup(meshes.make_mesh((2, 2, 2)), tensor)
