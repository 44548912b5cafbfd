"""The two passes over one leaf, in blocks and sharded, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from warp_jax.merging import kernels

LONG = 2 * kernels.BLOCK * kernels.BLOCKS_AT_ONCE + 777  # two steps of the loop and a tail


def _leaf(shape, seed, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _wide(x):
    return np.asarray(x).astype(np.float64)


def _exact(init, policies, layer_axis):
    deltas = [_wide(p) - _wide(init) for p in policies]
    layers = [[d] if layer_axis is None else np.split(d, d.shape[layer_axis], layer_axis) for d in deltas]
    inner = [[[np.sum(a * b) for b in layer] for a in layer] for layer in zip(*layers, strict=True)]
    return np.array(inner[0] if layer_axis is None else inner)


CASES = [((LONG,), None), ((3, LONG), 0), ((5,), None), ((), None), ((3, 4, 5), 0), ((1, 7), 0), ((LONG // 7, 3, 7), 1)]


@pytest.mark.parametrize(("shape", "layer_axis"), CASES)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_gram_in_blocks(shape, layer_axis, dtype):
    """Fails when a block is summed twice or left out, the tail is dropped, or a row reads its neighbour's elements."""
    init, *policies = (_leaf(shape, seed, dtype) for seed in range(3))
    found = kernels.gram(init, policies, layer_axis=layer_axis)
    want = _exact(init, policies, layer_axis)
    assert found.dtype == np.float64
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-12)
    traced = jax.jit(lambda init, *policies: kernels.gram(init, policies, layer_axis=layer_axis))(init, *policies)
    np.testing.assert_allclose(traced, want, rtol=1e-12)


def test_gram_of_three_is_symmetric_with_its_pairs_in_place():
    """Fails when the lower triangle is read in another order."""
    init, *policies = (_leaf((50,), seed) for seed in range(4))
    np.testing.assert_allclose(kernels.gram(init, policies, layer_axis=None), _exact(init, policies, None), rtol=1e-12)


def _sharded(x, *axes):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))


def test_sharded_leaves_are_not_gathered():
    """Fails when a shard leaves its device: only the small sums may travel."""
    leaves = [_sharded(_leaf((3, 64, 32), seed), None, "data", "model") for seed in range(3)]
    found = kernels.gram(leaves[0], leaves[1:], layer_axis=0)
    np.testing.assert_allclose(found, _exact(leaves[0], leaves[1:], 0), rtol=1e-12)
    with jax.enable_x64(True):
        first, *rest = leaves
        gram = kernels._plain_gram.lower(first, tuple(rest), layer_axis=0).compile().as_text()
        mix = kernels._mix.lower(rest[0], tuple(rest[1:]), first, jnp.ones((3, 3)), None).compile().as_text()
    assert "all-reduce" in gram
    for text in (gram, mix):
        assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    assert "all-reduce" not in mix


def test_the_result_takes_the_place_of_the_first_policy():
    """Fails when donation is not passed on: the first policy's array would stay alive."""
    init, first, second = (_leaf((64,), seed) for seed in range(3))
    kept = np.asarray(0.2 * (_wide(first) - _wide(init)) + 0.7 * (_wide(second) - _wide(init)) + _wide(init))
    with jax.enable_x64(True):
        weights = jnp.array([1, 0.2, 0.7])
    merged = kernels.weighted_sum(init, [first, second], weights, donate=True)
    np.testing.assert_allclose(merged, kept, rtol=1e-6)
    assert first.is_deleted()
    assert not second.is_deleted()
    assert not init.is_deleted()
