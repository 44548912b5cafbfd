"""Leaf names and merging units."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax import naming, trees
from warp_jax.merging import in_memory

Pair = collections.namedtuple("Pair", ["left", "right"])


def names_of(tree):
    return [trees.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_path_name():
    """Mutation: another separator, or keys with brackets and quotes."""
    tree = {"layers": [{"w": 1.0}, {"w": 2.0}], "top": Pair(3.0, 4.0)}
    assert names_of(tree) == ["layers/0/w", "layers/1/w", "top/left", "top/right"]


@pytest.mark.parametrize(
    ("name", "stacked"),
    [
        ("layers/attn/kernel", True),
        ("params/layers/attn/kernel", True),
        ("layers/layer_norm", True),
        ("layers/0/attn/kernel", False),
        ("params/layers/12/kernel", False),
        ("layers_0/kernel", False),
        ("sublayers/kernel", False),
        ("layers", False),
        ("head/layers", False),
        ("embed/kernel", False),
    ],
)
def test_is_stacked(name, stacked):
    """Mutation: 'layers' sought inside a key; numbers not told from other keys."""
    assert naming.is_stacked(name) is stacked


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("layers/attn/q", ["layers/0/attn/q", "layers/1/attn/q"]),
        ("params/layers/w", ["params/layers/0/w", "params/layers/1/w"]),
        ("sublayers/layers/w", ["sublayers/layers/0/w", "sublayers/layers/1/w"]),
    ],
)
def test_layer_names(name, want):
    """Mutation: the number after the first text 'layers/' in place of the key 'layers'; counting from 1."""
    assert naming.layer_names(name, 2) == want


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("layers/3/attn/q/kernel", "layers/3"),
        ("params/layers/13/mlp/up/kernel", "params/layers/13"),
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("transformer/h/7/ln_1/scale", "transformer/h/7"),
        ("h_7/ln_1/scale", "h_7"),
        ("blocks/1/w", "blocks/1"),
        ("block_1/w", "block_1"),
        ("layers_2/mlp/layers_0/kernel", "layers_2"),
        ("embed/embedding", "embed"),
        ("final_norm/scale", "final_norm"),
        ("head/kernel", "head"),
        ("head/bias", "head"),
        ("params/embed/embedding", "params/embed"),
        ("layer_norm/scale", "layer_norm"),
        ("batch_1/w", "batch_1"),
        ("w", "w"),
    ],
)
def test_layer_of(name, unit):
    """Mutation: the tensor, the first key, or the innermost number for the unit."""
    assert naming.layer_of(name) == unit


def stacked_tree():
    layers = {"attn": {"kernel": jnp.ones((2, 3, 3))}, "norm": {"scale": jnp.ones((2, 3))}}
    return {"embed": jnp.ones((5, 3)), "head": {"bias": jnp.ones(5), "kernel": jnp.ones((3, 5))}, "layers": layers}


UNITS = [
    ("layer", ("embed", "head", "layers/0", "layers/1"), [0, 1, 1, [2, 3], [2, 3]]),
    (
        "tensor",
        (
            "embed",
            "head/bias",
            "head/kernel",
            "layers/0/attn/kernel",
            "layers/1/attn/kernel",
            "layers/0/norm/scale",
            "layers/1/norm/scale",
        ),
        [0, 1, 2, [3, 4], [5, 6]],
    ),
    ("model", ("model",), [0, 0, 0, [0, 0], [0, 0]]),
    (lambda name: name.rsplit("/", 1)[-1], ("embed", "bias", "kernel", "scale"), [0, 1, 2, [2, 2], [3, 3]]),
]


@pytest.mark.parametrize(("unit", "names", "of_leaf"), UNITS, ids=["layer", "tensor", "model", "function"])
def test_units_of(unit, names, of_leaf):
    """Mutation: units numbered per leaf; a stacked leaf given one unit."""
    found, unit_of_leaf = in_memory.units_of(stacked_tree(), unit, "layers")
    assert found == names
    assert [np.asarray(x).tolist() for x in unit_of_leaf] == of_leaf
    assert [np.ndim(x) for x in unit_of_leaf] == [0, 0, 0, 1, 1]


def test_a_stacked_tree_has_the_units_of_the_unstacked():
    """Mutation: slices of a stacked leaf named otherwise than leaves of unstacked layers."""
    tree = stacked_tree()
    tree["layers"] = [jax.tree.map(lambda x, i=i: x[i], tree["layers"]) for i in range(2)]
    names, unit_of_leaf = in_memory.units_of(tree, "layer", "layers")
    assert names == ("embed", "head", "layers/0", "layers/1")
    assert [int(x) for x in unit_of_leaf] == [0, 1, 1, 2, 2, 3, 3]


def test_unknown_unit_raises():
    """Mutation: an unknown unit taken as 'layer'."""
    with pytest.raises(ValueError, match="unit: got 'layers', want 'layer'"):
        in_memory.units_of(stacked_tree(), "layers", "layers")


REFERENCE = {"a": {"x": jnp.ones(2), "y": jnp.ones((2, 3))}, "b": jnp.ones(4)}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"b": jnp.ones(4)}, "what: leaf 'a/x' is missing"),
        ({}, "what: leaf 'a/x' is missing"),
        (REFERENCE | {"d": jnp.ones(1), "c": jnp.ones(1)}, "what: leaf 'c' is not in the reference tree"),
        (REFERENCE | {"b": jnp.ones((4, 1))}, r"what: leaf 'b' has shape \(4, 1\), want \(4,\)"),
    ],
)
def test_a_leaf_that_differs_is_named(other, message):
    """Mutation: leaves that are missing, extra or of another shape not checked; a leaf other than the first named."""
    with pytest.raises(ValueError, match=message):
        trees.check_same_structure(REFERENCE, other, "what")


def test_containers_that_differ_raise():
    """Mutation: containers not compared."""
    with pytest.raises(ValueError, match="what: same leaves, but containers differ"):
        trees.check_same_structure([jnp.ones(2), jnp.ones(3)], (jnp.ones(2), jnp.ones(3)), "what")


def test_the_same_structure_passes():
    """Mutation: dtypes or values compared."""
    trees.check_same_structure(REFERENCE, jax.tree.map(lambda x: 3 * x.astype(jnp.bfloat16), REFERENCE), "what")
