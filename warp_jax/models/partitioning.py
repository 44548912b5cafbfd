"""Sharding rules: one table that maps each parameter's path to a PartitionSpec.

It applies to policy, anchor, init, Adam moments, task vectors and the reward model: their leaf paths are the same.
The factors of LoRA are split like the inputs and the outputs of their kernel, and the rank is not split.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from warp_jax import naming, trees
from warp_jax.parallel import meshes

# (pattern of the end of a leaf's path, mesh axis of each array axis). Stacked leaves have the layer axis first.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding", PartitionSpec("tensor", "fsdp")),
    (r"layers(_from_\d+)?/attention/[qkv]/kernel", PartitionSpec(None, "fsdp", "tensor", None)),
    (r"layers(_from_\d+)?/attention/[qkv]/bias", PartitionSpec(None, "tensor", None)),
    (r"layers(_from_\d+)?/attention/o/kernel", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"layers(_from_\d+)?/mlp/(gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers(_from_\d+)?/mlp/down/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers(_from_\d+)?/((attention|mlp)(_post)?|attention/[qk])_norm/scale", PartitionSpec()),
    (r"final_norm/scale", PartitionSpec()),
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (r"score/kernel", PartitionSpec("fsdp", None)),
)
FACTOR = re.compile(r"(.*kernel)/([ab])")


def partition_spec(name: str, shape: Sequence[int]) -> PartitionSpec:
    """The PartitionSpec of a leaf path; scalars are not split. Raises ValueError if no rule matches."""
    if not shape:
        return PartitionSpec()
    if factor := FACTOR.fullmatch(name):
        spec, stack = partition_spec(factor[1], shape), int(naming.is_stacked(name))
        axes = stack + naming.num_inputs(factor[1])  # before the outputs
        if factor[2] == "a":
            return PartitionSpec(*spec[:axes], None)
        return PartitionSpec(*spec[:stack], None, *spec[axes:])
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", name):
            return spec
    raise ValueError(f"sharding: no rule for leaf {name!r} of shape {tuple(shape)}; add one to partitioning.RULES")


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every leaf of a tree of arrays or shapes (parameters, TrainState, Adam moments)."""

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, shape = trees.path_name(path), tuple(leaf.shape)
        spec = partition_spec(name, shape)
        # with fewer key-value heads than chips along `tensor`, every chip keeps all of them: its queries need them
        if (
            re.search("/attention/[kv]/", name)
            and "tensor" in spec
            and mesh.shape["tensor"] % shape[spec.index("tensor")] == 0
        ):
            spec = meshes.divisible(mesh, shape, spec)
        for size, axis in zip(shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"sharding: leaf {name!r} has shape {shape}; {size} is not divisible by mesh axis {axis!r} of size "
                    f"{mesh.shape[axis]}; choose a smaller {axis!r} axis"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def decode_shardings(mesh: Mesh, tree: Any) -> Any:
    """Like `param_shardings`, but not split along `fsdp`, because generation reads every weight for every token."""

    def without_fsdp(leaf: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in leaf.spec)))

    return jax.tree.map(without_fsdp, param_shardings(mesh, tree))


def with_shardings(mesh: Mesh, shapes: Any) -> Any:
    """Tree of jax.ShapeDtypeStruct with the sharding of every leaf by the table."""
    return shaped(shapes, param_shardings(mesh, shapes))


def shaped(shapes: Any, shardings: Any) -> Any:
    """Tree of jax.ShapeDtypeStruct with the shapes of one tree and the shardings of the other."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
