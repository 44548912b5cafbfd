"""LoRA factors as functions: their start, their product, and the factors nearest to a matrix."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from warp_jax.models import lora

SHAPES = {  # L = 2 layers, D = 6, H = 3 heads of 4, F = 5, V = 7
    "layers/attention/q/kernel": (2, 6, 3, 4),
    "layers/attention/o/kernel": (2, 3, 4, 6),
    "layers/mlp/up/kernel": (2, 6, 5),
    "lm_head/kernel": (6, 7),
}
FACTORS = {
    "layers/attention/q/kernel/a": (2, 6, 2),
    "layers/attention/q/kernel/b": (2, 2, 3, 4),
    "layers/attention/o/kernel/a": (2, 3, 4, 2),
    "layers/attention/o/kernel/b": (2, 2, 6),
    "layers/mlp/up/kernel/a": (2, 6, 2),
    "layers/mlp/up/kernel/b": (2, 2, 5),
    "lm_head/kernel/a": (6, 2),
    "lm_head/kernel/b": (2, 7),
}
PRODUCTS = {
    "layers/attention/q/kernel": "ldr,lrhk->ldhk",
    "layers/attention/o/kernel": "lhkr,lrd->lhkd",
    "layers/mlp/up/kernel": "ldr,lrf->ldf",
    "lm_head/kernel": "dr,rv->dv",
}


def _tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in shapes.items():
        *parents, last = name.split("/")
        group = tree
        for parent in parents:
            group = group.setdefault(parent, {})
        group[last] = rng.normal(size=shape).astype(np.float32)
    return tree


def test_the_first_factors_change_nothing():
    """Fails when B is not 0, a leaf has no factors, axes of A and B are exchanged, or kernels share their noise."""
    start = _tree(SHAPES)
    factors = lora.init(jax.random.key(3), start, 2)
    flat = flatten_dict(factors, sep="/")
    assert {name: leaf.shape for name, leaf in flat.items()} == FACTORS
    assert all((np.abs(leaf).max() == 0) == name.endswith("b") for name, leaf in flat.items())
    jax.tree.map(np.testing.assert_array_equal, lora.expand(start, factors, 5.0), start)
    q, up = flat["layers/attention/q/kernel/a"], flat["layers/mlp/up/kernel/a"]
    assert not np.allclose(q, up)
    other = lora.init(jax.random.key(4), start, 2)["layers"]["mlp"]["up"]["kernel"]["a"]
    assert not np.allclose(up, other)


@pytest.mark.parametrize(("name", "inputs"), [("attention/o", 48), ("mlp/up", 80), ("attention/q", 80)])
def test_noise_has_the_variance_of_one_over_the_inputs(name, inputs):
    """Fails when the layers or the outputs count as inputs, or only one input axis of the attention's output counts."""
    first, second = name.split("/")
    shape = (3, 4, 12, 80) if name == "attention/o" else (3, 80, 10, 4)
    start = {"layers": {first: {second: {"kernel": np.zeros(shape, np.float32)}}}}
    a = np.asarray(jax.tree.leaves(lora.init(jax.random.key(1), start, 40))[0])
    assert a.var() * inputs == pytest.approx(1, rel=0.05)


def test_weights_by_hand():
    """Fails when the scale is alpha, 1 / rank or their product, layers mix, or another leaf of the tree is returned."""
    start, factors = _tree(SHAPES), _tree(FACTORS, seed=1)
    whole = {**start, "embed": {"embedding": np.ones((7, 6), np.float32)}}
    found = flatten_dict(lora.expand(whole, factors, 5.0), sep="/")
    assert found.keys() == SHAPES.keys()
    before, flat = flatten_dict(start, sep="/"), flatten_dict(factors, sep="/")
    for name, product in PRODUCTS.items():
        a, b = (flat[f"{name}/{kind}"].astype(np.float64) for kind in "ab")
        np.testing.assert_allclose(found[name], before[name] + 2.5 * np.einsum(product, a, b), atol=2e-6, err_msg=name)


def test_factors_nearest_to_a_matrix():
    """Fails when the smallest values are kept, one factor gets the values twice, or a rank above the sides is cut."""
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(size, 4)))[0] for size in (9, 6))
    matrix = (left * [5.0, 3.0, 0.4, 0.3]) @ right.T
    outer, inner = lora.refactor(matrix, 2)
    assert (outer.shape, inner.shape) == ((9, 2), (2, 6))
    assert np.linalg.norm(matrix - outer @ inner) == pytest.approx(0.5, rel=1e-9)  # of 0.4 and 0.3
    assert np.linalg.norm(outer, axis=0) == pytest.approx(np.linalg.norm(inner, axis=1))
    outer, inner = lora.refactor(matrix, 8)
    assert (outer.shape, inner.shape) == ((9, 8), (8, 6))
    np.testing.assert_allclose(outer @ inner, matrix, atol=1e-12)
