"""The splash kernel in interpret mode, compared with plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from warp_jax.models import attention
from warp_jax.parallel import meshes

BATCH, LENGTH, HEADS, SIZE = 2, 150, 4, 128
MESH = meshes.make_mesh((1, 2, 2), jax.devices()[:4])
LEFT_PADDED = np.arange(LENGTH) >= np.array([[0], [37]])


def _inputs(groups):
    generator = np.random.default_rng(3)
    shapes = [(BATCH, LENGTH, heads, SIZE) for heads in (HEADS, groups, groups)]
    query, key, value = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes)
    return query * SIZE**-0.5 * 3, key.swapaxes(1, 2), jnp.transpose(value, (0, 2, 3, 1))


def _plain(query, key, value, window, softcap):
    positions = jnp.maximum(jnp.cumsum(LEFT_PADDED, axis=1) - 1, 0)
    positions = attention.Positions(positions, positions, jnp.asarray(LEFT_PADDED))
    local = jnp.array(True) if window else None
    return attention.plain(query, key, value, attention.visible(positions, local, window), softcap)


@pytest.mark.parametrize(
    ("groups", "window", "softcap"), [(4, 0, 0.0), (2, 40, 0.0), (1, 0, 5.0)], ids=["all", "window", "softcap"]
)
def test_splash_equals_plain(groups, window, softcap):
    """Fails when a window is one token off, padding is visible, the cap is missing, or heads are on the wrong chip; in
    values and in gradients."""
    inputs = _inputs(groups)
    weight = np.where(LEFT_PADDED[:, :, None, None], np.random.default_rng(4).normal(size=inputs[0].shape), 0)

    def total(attend, *inputs):
        mixed = attend(*inputs)
        return (mixed * weight).sum(), mixed

    splash = functools.partial(
        attention.splash, valid=jnp.asarray(LEFT_PADDED), window=window, softcap=softcap, mesh=MESH, interpret=True
    )
    plain = functools.partial(_plain, window=window, softcap=softcap)
    run = {
        name: jax.jit(jax.value_and_grad(functools.partial(total, fn), argnums=(0, 1, 2), has_aux=True))(*inputs)
        for name, fn in (("splash", splash), ("plain", plain))
    }
    ((_, got), got_grads), ((_, want), want_grads) = run["splash"], run["plain"]
    np.testing.assert_allclose(got[LEFT_PADDED], want[LEFT_PADDED], atol=2e-5)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("window", [0, 40])
def test_splash_for_the_last_queries(window):
    """Fails if the queries are taken for the first tokens, or the padding of queries and keys is the same."""
    (query, key, value), first = _inputs(2), 37
    want = _plain(query, key, value, window, 0.0)[:, first:]
    splash = functools.partial(attention.splash, window=window, softcap=0.0, mesh=MESH, interpret=True)
    got = jax.jit(splash)(query[:, first:], key, value, jnp.asarray(LEFT_PADDED))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_splash_on_the_rows_of_one_device():
    """Fails when rows that a `shard_map` over the batch has split are split again, or the kernel is not used there."""

    def attend(query, key, value, valid):
        assert not meshes.manual_axes() or attention.splash_fits(query.astype("bfloat16"), key, _TpuMesh(2))
        return attention.splash(query, key, value, valid, window=0, softcap=0.0, mesh=MESH, interpret=True)

    inputs, rows = (*_inputs(2), jnp.asarray(LEFT_PADDED)), PartitionSpec(meshes.BATCH)
    found = jax.jit(meshes.map_shards(attend, MESH, (rows,) * 4, rows, meshes.BATCH))(*inputs)
    np.testing.assert_allclose(found[LEFT_PADDED], attend(*inputs)[LEFT_PADDED], atol=1e-6)


def test_meshes_of_cpus_use_the_plain_one():
    """Fails when the kernel is used without a TPU."""
    query, key, _ = _inputs(2)
    assert not attention.splash_fits(query, key, None)
    assert not attention.splash_fits(query, key, MESH)


@pytest.mark.parametrize("local", [None, False, True], ids=["no_windows", "whole", "window"])
def test_the_kernel_sees_what_the_plain_one_does(monkeypatch, local):
    """Fails when local and global layers are swapped on TPU, or only one of the two scales the queries."""
    inputs = _inputs(2)
    positions = jnp.maximum(jnp.cumsum(LEFT_PADDED, axis=1) - 1, 0)
    positions = attention.Positions(positions, positions, jnp.asarray(LEFT_PADDED))

    @functools.partial(jax.jit, static_argnums=0)
    def attend(mesh, local):
        return attention.attend(*inputs, positions, local=local, window=40, softcap=0.0, mesh=mesh)

    local = None if local is None else jnp.array(local)
    want = attend(None, local)
    monkeypatch.setattr(attention, "splash_fits", lambda query, key, mesh: mesh is not None)
    monkeypatch.setattr(attention, "splash", functools.partial(attention.splash, interpret=True))
    np.testing.assert_allclose(attend(MESH, local)[LEFT_PADDED], want[LEFT_PADDED], atol=2e-5)


class _TpuMesh:
    """The attributes of a TPU mesh that splash_fits reads."""

    def __init__(self, tensor):
        self.devices = np.array([type("Chip", (), {"platform": "tpu"})])
        self.shape = {"data": 1, "fsdp": 2, "tensor": tensor}


@pytest.mark.parametrize(
    ("shape", "tensor", "dtype", "fits"),
    [
        ((2, 128, LENGTH), 2, "bfloat16", True),
        ((1, 128, LENGTH), 4, "bfloat16", True),
        ((2, 128, LENGTH), 4, "bfloat16", False),
        ((2, 64, LENGTH), 2, "bfloat16", False),
        ((2, 128, 1), 2, "bfloat16", False),
        ((2, 128, LENGTH), 2, "float32", False),
    ],
    ids=["fits", "one_shared_head", "shared_heads", "small_heads", "cached", "rounded_in_the_kernel"],
)
def test_shapes_that_the_kernel_supports(shape, tensor, dtype, fits):
    """Fails when the kernel gets a shape that it does not support, or float32, which it would round."""
    groups, size, queries = shape
    query, key = jnp.zeros((BATCH, queries, HEADS, size), dtype), jnp.zeros((BATCH, groups, LENGTH, size))
    assert attention.splash_fits(query, key, _TpuMesh(tensor)) is fits
