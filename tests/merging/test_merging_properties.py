"""Properties of merging on random trees, and merging of trees from other libraries."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from warp_jax import merging

COUNTS = st.integers(1, 8)
LAYERS = 3
SHAPES = {"embed": (5, 4), "layers": {"attn": (LAYERS, 4, 4), "norm": (LAYERS, 4)}, "norm": (4,)}
FEW = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def _trees(draw, count=COUNTS):
    """Init and policies: task vectors of lengths 1e-3 to 1 that lean on a common one, at angles of 0 to 90 degrees."""
    number = draw(count)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    common = draw(st.floats(0, 1))
    lengths = [10 ** draw(st.floats(-3, 0)) for _ in range(number)]

    def tree(function):
        return jax.tree.map(function, SHAPES, is_leaf=lambda x: type(x) is tuple)

    init, shared = (tree(lambda s: rng.normal(size=s)) for _ in range(2))
    policies = []
    for length in lengths:
        own = tree(lambda s: rng.normal(size=s))
        policies.append(jax.tree.map(lambda i, s, o, r=length: i + r * (common * s + o), init, shared, own))
    as_arrays = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t) for t in (init, *policies)]
    return as_arrays[0], as_arrays[1:]


def _unstack(tree):
    layers = {str(i): {name: x[i] for name, x in tree["layers"].items()} for i in range(LAYERS)}
    return {**tree, "layers": layers}


def _close(a, b, scale=1.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6 * scale, atol=2e-6 * scale), a, b)


def _length(tree):
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree))))


@FEW
@given(_trees(), st.sampled_from(["layer", "tensor", "model"]))
def test_stacked_is_unstacked(trees, unit):
    """Fails when a slice of a stacked leaf is given another unit than the layer's own leaf."""
    init, policies = trees
    stacked = merging.slerp(init, policies, unit=unit)
    apart = merging.slerp(_unstack(init), [_unstack(p) for p in policies], unit=unit)
    _close(_unstack(stacked), apart)


@FEW
@given(_trees(), st.floats(0, 2), st.sampled_from(list(merging.METHODS)))
def test_liti_rate_is_linear_between_init_and_merge(trees, rate, method):
    """Fails when a method's step towards the merge starts elsewhere than at init."""
    init, policies = trees
    if method == "model_stock" and len(policies) < 2:
        return
    merged = merging.merge(init, policies, method)
    _close(merging.merge(init, policies, method, liti_rate=rate), merging.liti(init, merged, rate), scale=4)
    _close(merging.merge(init, policies, method, liti_rate=0.0), init)


@FEW
@given(
    _trees(),
    st.randoms(use_true_random=False),
    st.sampled_from(["karcher", "slerp_symmetric", "lerp", "task_arithmetic"]),
)
def test_symmetric_methods_have_no_order(trees, random, method):
    """Fails when a coefficient depends on the place of its policy."""
    init, policies = trees
    shuffled = random.sample(policies, len(policies))
    _close(merging.merge(init, policies, method), merging.merge(init, shuffled, method), scale=4)


@FEW
@given(_trees(count=st.just(2)), st.floats(0, 1))
def test_two_policies_swap_with_their_weight(trees, weight):
    """Fails when the weight counts from the wrong end."""
    init, (a, b) = trees
    _close(merging.slerp(init, [a, b], weights=[weight]), merging.slerp(init, [b, a], weights=[1 - weight]), scale=2)


@FEW
@given(_trees())
def test_symmetric_merge_has_the_mean_length(trees):
    """Fails when lengths are not those of the unit."""
    init, policies = trees
    moved = [
        jax.tree.map(jnp.subtract, p, init) for p in (*policies, merging.symmetric_slerp(init, policies, unit="model"))
    ]
    *lengths, merged = map(_length, moved)
    assert merged == pytest.approx(np.mean(lengths), rel=1e-4, abs=1e-5)


@FEW
@given(_trees(), st.sampled_from([jnp.bfloat16, jnp.float16]))
def test_low_precision_is_rounded_once(trees, dtype):
    """Fails when sums are in the dtype of the weights: the merge must be the rounded merge of the same numbers."""
    init, policies = (jax.tree.map(lambda x: x.astype(dtype), t) for t in trees)
    wide_init, wide_policies = (jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in (init, policies))
    moved = [jax.tree.map(jnp.subtract, p, wide_init) for p in wide_policies]
    if min(map(_length, moved)) == 0:
        return
    want = jax.tree.map(lambda x: x.astype(dtype), merging.slerp(wide_init, wide_policies))
    found = merging.slerp(init, policies)
    eps = float(jnp.finfo(dtype).eps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=eps, atol=1e-6),
        found,
        want,
    )


# ---------------------------------------------------------------- trees of other libraries


def _moved_by(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.01 * rng.normal(size=x.shape), x.dtype), tree)


def test_flax_nnx_states():
    """Fails when the paths of nnx hide the layers, or the state cannot be put back into its module."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(6, 4, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            return x

    definition, init = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    policies = [_moved_by(init, seed) for seed in (1, 2)]
    assert len(merging.gram(init, policies).names) == 3
    merged = nnx.merge(definition, merging.slerp(init, policies))
    assert merged(jnp.array([1, 2])).shape == (2, 4)


def test_equinox_modules():
    """Fails when a leaf that is not an array is merged without an error."""
    model = eqx.nn.MLP(2, 1, 3, 2, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_array)
    policies = [_moved_by(arrays, seed) for seed in (1, 2)]
    assert merging.gram(arrays, policies).names == ("layers/0", "layers/1", "layers/2")
    merged = eqx.combine(merging.slerp(arrays, policies), rest)
    assert merged(jnp.ones(2)).shape == (1,)
    with pytest.raises(ValueError, match="want a floating-point array; pass the weights only"):
        merging.slerp(model, [model, model])


def test_stacked_leaves_under_another_key():
    """Fails when only 'layers' can be stacked, or a tree with unstacked `layers` is taken as stacked."""
    rng = np.random.default_rng(0)
    init = {"blocks": {"w": jnp.zeros((2, 3))}, "layers": {"w": jnp.zeros((2, 3))}}
    policies = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), init) for _ in range(2)]
    assert merging.gram(init, policies, stacked="blocks").names == ("blocks/0", "blocks/1", "layers")
    assert merging.gram(init, policies, stacked=None).names == ("blocks", "layers")


def test_a_function_names_the_units():
    """Fails when a function of the leaf's path is not called."""
    init = {"a": {"x": jnp.zeros(2), "y": jnp.zeros(2)}, "b": {"x": jnp.zeros(2)}}
    policies = [_moved_by(init, seed) for seed in (1, 2)]
    assert merging.gram(init, policies, lambda name: name.split("/")[-1]).names == ("x", "y")
