"""The mesh, and the table that lays every leaf on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from tests.settings_of import settings_of
from warp_jax import trees
from warp_jax.models import partitioning
from warp_jax.models.transformer import Transformer, TransformerConfig
from warp_jax.parallel import meshes
from warp_jax.training import anchors, reinforce

PLAIN = TransformerConfig(vocab_size=24, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=32)
VARIANTS = {
    "plain": {},
    "untied_bias": {"tied_head": False, "qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "post_norms": {"post_norms": True, "qk_norm": True, "local_pattern": (True, False), "sliding_window": 3},
    "reward_model": {"head": "scalar"},
}
EXPECTED = {
    "embed/embedding": PartitionSpec("tensor", "fsdp"),
    "layers/attention/q/kernel": PartitionSpec(None, "fsdp", "tensor", None),
    "layers/attention/v/bias": PartitionSpec(None, "tensor", None),
    "layers/attention/o/kernel": PartitionSpec(None, "tensor", None, "fsdp"),
    "layers/attention/k_norm/scale": PartitionSpec(),
    "layers/attention_post_norm/scale": PartitionSpec(),
    "layers/mlp_norm/scale": PartitionSpec(),
    "layers/mlp/up/kernel": PartitionSpec(None, "fsdp", "tensor"),
    "layers/mlp/down/kernel": PartitionSpec(None, "tensor", "fsdp"),
    "final_norm/scale": PartitionSpec(),
    "lm_head/kernel": PartitionSpec("fsdp", "tensor"),
    "score/kernel": PartitionSpec("fsdp", None),
}


def param_shapes(**settings):
    model = Transformer(dataclasses.replace(PLAIN, **settings))
    ids = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0)["params"]


def by_name(tree):
    return {trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_split_as_the_table_says(variant):
    """Fails if a leaf's rule is removed, or if two axes of a rule are swapped."""
    shapes = param_shapes(**VARIANTS[variant])
    shardings = by_name(partitioning.param_shardings(meshes.make_mesh((2, 2, 2)), shapes))
    assert shardings.keys() == by_name(shapes).keys()
    for name in EXPECTED.keys() & shardings.keys():
        assert shardings[name].spec == EXPECTED[name], name


def test_expectations_cover_every_kind_of_leaf():
    """Fails if a kind of leaf above is renamed in the model, so that the test before would skip it."""
    names = set().union(*(by_name(param_shapes(**settings)) for settings in VARIANTS.values()))
    assert names >= EXPECTED.keys()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("layers/attention/q/kernel", (3, 8, 2, 6)),
        ("layers/attention/o/kernel", (3, 2, 6, 8)),
        ("layers/mlp/gate/kernel", (3, 8, 16)),
        ("embed/embedding", (12, 8)),
        ("layers/mlp_norm/scale", (3, 16)),
    ],
)
def test_shape_on_one_device(name, want):
    """Fails if a rule leaves out the layer axis, so that axes shift by one."""
    shapes = param_shapes()
    placed = by_name(partitioning.param_shardings(meshes.make_mesh((2, 2, 2)), shapes))[name]
    assert placed.shard_shape(by_name(shapes)[name].shape) == want


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_and_adam_moments_lie_as_their_parameters(variant):
    """Fails if rules match from the start of the path, which the moments' paths do not share."""
    shapes = param_shapes(**VARIANTS[variant])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, 1e-3, 10)))
    rule = reinforce.Rule(lambda *args: None, optimizer, settings_of().rl, anchors.ema(0.2))
    state = jax.eval_shape(functools.partial(reinforce.init_state, rule), shapes)
    mesh = meshes.make_mesh((2, 2, 2))
    placed, wanted = partitioning.param_shardings(mesh, state), partitioning.param_shardings(mesh, shapes)
    adam = placed.opt_state[1][0]
    assert [placed.params, placed.anchor_params, adam.mu, adam.nu] == [wanted] * 4
    assert placed.step.spec == adam.count.spec == PartitionSpec()


FACTORS = {
    "layers/attention/q/kernel/a": PartitionSpec(None, "fsdp", None),
    "layers/attention/q/kernel/b": PartitionSpec(None, None, "tensor", None),
    "layers_from_2/attention/o/kernel/a": PartitionSpec(None, "tensor", None, None),
    "opt_state/1/mu/layers/attention/o/kernel/b": PartitionSpec(None, None, "fsdp"),
    "layers/mlp/down/kernel/a": PartitionSpec(None, "tensor", None),
    "layers/mlp/down/kernel/b": PartitionSpec(None, None, "fsdp"),
    "lm_head/kernel/a": PartitionSpec("fsdp", None),
    "lm_head/kernel/b": PartitionSpec(None, "tensor"),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_split_as_their_kernel(name):
    """Fails when the rank is split, A gets the outputs, or the second input axis of the output projection is B's."""
    assert partitioning.partition_spec(name, (2,) * len(FACTORS[name])) == FACTORS[name]


def test_factors_of_few_key_heads_are_whole_on_every_chip():
    """Fails when A of keys, which has no heads, or B with fewer heads than chips is refused."""
    mesh = meshes.make_mesh((1, 2, 4))
    tree = {"layers": {"attention": {"k": {"kernel": {"a": jnp.zeros((3, 16, 2)), "b": jnp.zeros((3, 2, 2, 6))}}}}}
    placed = by_name(partitioning.param_shardings(mesh, tree))
    assert placed["layers/attention/k/kernel/a"].shard_shape((3, 16, 2)) == (3, 8, 2)
    assert placed["layers/attention/k/kernel/b"].shard_shape((3, 2, 2, 6)) == (3, 2, 2, 6)


@pytest.mark.parametrize(
    "name", ["layers/attention/w/kernel", "my_lm_head/kernel", "lm_head/kernel/extra", "embedding"]
)
def test_unknown_leaf_is_refused_with_name_and_shape(name):
    """Fails with a catch-all rule, or if a rule may match a part of a name."""
    with pytest.raises(ValueError, match=rf"no rule for leaf '{name}' of shape \(16, 24\)"):
        partitioning.partition_spec(name, (16, 24))


def test_unknown_leaf_in_a_tree_is_refused():
    """Fails if param_shardings replicates what it does not know."""
    with pytest.raises(ValueError, match=r"no rule for leaf 'adapter/kernel' of shape \(8, 2\)"):
        partitioning.param_shardings(meshes.make_mesh((8, 1, 1)), {"adapter": {"kernel": jnp.zeros((8, 2))}})


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        (
            (1, 1, 8),
            {},
            r"'layers/attention/o/kernel' has shape \(3, 4, 6, 16\); 4 is not divisible .*'tensor' of size 8",
        ),
        ((1, 8, 1), {"width": 12}, r"'embed/embedding' has shape \(24, 12\); 12 is not divisible .*'fsdp' of size 8"),
        ((2, 2, 2), {"mlp_dim": 31}, r"'layers/mlp/down/kernel' has shape \(3, 31, 16\); 31 is not divisible"),
    ],
)
def test_indivisible_leaf_is_refused_by_name(sizes, settings, message):
    """Fails if divisibility is left to the compiler, or checked on the wrong axis."""
    with pytest.raises(ValueError, match=message):
        partitioning.param_shardings(meshes.make_mesh(sizes), param_shapes(**settings))


@pytest.mark.parametrize(
    ("sizes", "want"),
    [((2, 4, 1), (2, 4, 1)), ((-1, 2, 1), (4, 2, 1)), ((1, -1, 4), (1, 2, 4)), ((1, 1, -1), (1, 1, 8))],
)
def test_mesh_sizes(sizes, want):
    """Fails if -1 takes all devices instead of those that remain."""
    mesh = meshes.make_mesh(sizes)
    assert (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]) == want


def test_mesh_of_chosen_devices():
    """Fails if make_mesh ignores the devices it is given."""
    chosen = jax.devices()[5:7]
    assert list(meshes.make_mesh((1, -1, 1), chosen).devices.flat) == chosen


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 1), "one positive size for each"),
        ((-1, -1, 1), "at most one -1"),
        ((0, 8, 1), "one positive size"),
        ((-2, 4, 1), "one positive size"),
        ((4, 1, 1), r"\(4, 1, 1\) need 4 devices, this machine has 8"),
        ((-1, 3, 1), r"\(2, 3, 1\) need 6 devices"),
        ((-1, 16, 1), r"\(1, 16, 1\) need 16 devices"),
    ],
)
def test_wrong_mesh_sizes_are_refused(sizes, message):
    """Fails if sizes that do not use all devices pass."""
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(sizes)


@pytest.mark.parametrize(("sizes", "rows"), [((8, 1, 1), 2), ((2, 2, 2), 4), ((1, 2, 4), 8)])
def test_batch_is_split_over_data_and_fsdp(sizes, rows):
    """Fails if the batch is split over `data` alone, or over `tensor` too."""
    mesh = meshes.make_mesh(sizes)
    batch = meshes.put_batch(mesh, {"ids": jnp.arange(48).reshape(16, 3)})
    assert {shard.data.shape for shard in batch["ids"].addressable_shards} == {(rows, 3)}
    assert meshes.batch_devices(mesh) == 16 // rows


def test_batches_are_split_each():
    """Fails if whole batches lie on one device, which then computes alone."""
    batch = meshes.put_batch(meshes.make_mesh((2, 2, 2)), jnp.arange(96).reshape(2, 16, 3), axis=1)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 4, 3)}


def test_replicated_is_whole_everywhere():
    """Fails if `replicated` splits the first axis."""
    placed = jax.device_put(jnp.arange(16), meshes.replicated(meshes.make_mesh((2, 2, 2))))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(16,)}
