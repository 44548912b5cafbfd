"""Freezing by name patterns: how stacks are cut, and how trees are split and joined."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from warp_jax import merging, naming, trees
from warp_jax.models import apply, freezing
from warp_jax.models.transformer import TransformerConfig, init_cache

CONFIG = TransformerConfig(
    vocab_size=11,
    width=16,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    local_pattern=(True, True, False),
    sliding_window=3,
    rope_theta_local=20.0,
)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 10, 7]], np.int32)
MASK = np.array([[True] * 7, [False] * 2 + [True] * 5])


def _random(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = apply.param_shapes(config)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, jnp.float32), shapes)


def _cut(groups):
    return dataclasses.replace(CONFIG, layer_groups=groups)


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("", ()),
        ("layers/", ()),
        ("embed", ()),
        ("layers/[34]/", (3, 2)),
        ("layers/1/attention", (1, 1, 3)),
        ("layers/(0|1|4)/mlp", (2, 2, 1)),
    ],
)
def test_stacks_are_cut_where_the_pattern_changes(pattern, want):
    """Fails when a stack holds both trained and frozen layers, or is cut where nothing changes."""
    assert freezing.layer_groups(apply.param_shapes(CONFIG), pattern) == want


def test_stacks_are_cut_for_each_of_several_patterns():
    """Fails when stacks are cut for the weights that match all patterns only: SFT trains more than LoRA adapts."""
    shapes = apply.param_shapes(CONFIG)
    assert freezing.layer_groups(shapes, "layers/[34]/", "attention", "/kernel$") == (3, 2)
    assert freezing.layer_groups(shapes, "", "layers/[01]/attention/[qv]", "/kernel$") == (2, 3)
    assert freezing.layer_groups(shapes, "layers/[34]/|embed", "layers/4/", "/kernel$") == (3, 1, 1)
    with pytest.raises(ValueError, match=r"^trainable: no weight matches 'nosuch'"):
        freezing.layer_groups(shapes, "nosuch", "attention", "/kernel$")
    with pytest.raises(ValueError, match=r"^lora.targets: no weight matches 'layers/3/' and 'layers/4/' and"):
        freezing.layer_groups(shapes, "layers/3/", "layers/4/", "/kernel$")


def test_a_weight_is_trained_if_all_patterns_match():
    """Fails when one pattern is enough."""
    trained, frozen = freezing.split(_random(_cut((3, 2))), "layers/[34]/|embed", "attention|embed", "/kernel$")
    assert set(trained) == {"layers_from_3"}
    assert set(trained["layers_from_3"]) == {"attention"}
    assert {"embed", "layers_from_0", "layers_from_3"} < set(frozen)


def test_slices_of_a_later_stack_count_on():
    """Fails when layer 3 of the model is called layer 0 of its stack: angles would be of other layers."""
    assert naming.layer_names("layers_from_3/mlp/up/kernel", 2) == ["layers/3/mlp/up/kernel", "layers/4/mlp/up/kernel"]
    assert naming.is_stacked("layers_from_3/mlp/up/kernel")
    assert not naming.is_stacked("layers_from_x/mlp/up/kernel")
    assert not naming.is_stacked("layers/3/mlp/up/kernel")


def test_a_cut_model_computes_the_same():
    """Fails when a later stack starts at layer 0: its windows, its rotary angles and its cache are another layer's."""
    whole = _random(CONFIG)
    cut = freezing.restacked(whole, _random(_cut((1, 3, 1)), seed=1))
    want, _ = apply.make_apply_fn(CONFIG)(whole, IDS, MASK)
    got, _ = apply.make_apply_fn(_cut((1, 3, 1)))(cut, IDS, MASK)
    np.testing.assert_allclose(got, want, atol=1e-5)
    cache = init_cache(CONFIG, 2, 7)
    apply_fn = apply.make_apply_fn(_cut((1, 3, 1)))
    first, cache = apply_fn(cut, IDS[:, :4], MASK[:, :4], cache)
    second, _ = apply_fn(cut, IDS[:, 4:], MASK[:, 4:], cache)
    both = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(both[MASK], np.asarray(want)[MASK], atol=1e-4)


def test_restacking_and_back_is_exact():
    """Fails when layers change their order, or a leaf that the source lacks is lost."""
    whole = _random(CONFIG)
    there = freezing.restacked(whole, _random(_cut((2, 3)), seed=1))
    back = freezing.restacked(there, _random(CONFIG, seed=2))
    jax.tree.map(np.testing.assert_array_equal, whole, back)
    head = dataclasses.replace(CONFIG, head="scalar", num_layers=2)
    like = _random(head, seed=3)
    taken = freezing.restacked(whole, like)
    np.testing.assert_array_equal(taken["score"]["kernel"], like["score"]["kernel"])
    np.testing.assert_array_equal(taken["layers"]["mlp"]["up"]["kernel"], whole["layers"]["mlp"]["up"]["kernel"][:2])


def test_split_and_join():
    """Fails when a leaf is in both parts or in none, or the two parts are swapped."""
    params = _random(_cut((3, 2)))
    trained, frozen = freezing.split(params, "layers/[34]/|final_norm")
    assert set(trained) == {"layers_from_3", "final_norm"}
    assert set(frozen) == {"embed", "layers_from_0"}
    joined = trees.join(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))


def test_angles_of_a_later_stack_carry_its_layers():
    """Fails when merging takes the layers of a later stack for one unit, or numbers them from 0."""
    init, first, second = (freezing.split(_random(_cut((3, 2)), seed), "layers/[34]/")[0] for seed in (1, 2, 3))
    assert merging.gram(init, [first, second]).names == ("layers/3", "layers/4")


def test_layers_below_the_first_trained_one_by_hand():
    """Fails when layers count as shared by policy and SFT although the embedding below them is trained."""
    stacks = (("layers_from_0", 0, 4), ("layers_from_4", 4, 6), ("layers_from_6", 6, 9))
    assert freezing.trunk_layers({"layers_from_4": {}, "layers_from_6": {}}, stacks) == 4
    assert freezing.trunk_layers({"embed": {}, "layers_from_6": {}}, stacks) == 0
    assert freezing.trunk_layers({"layers_from_0": {}, "layers_from_6": {}}, stacks) == 0
    assert freezing.trunk_layers({"final_norm": {}}, stacks) == 9
