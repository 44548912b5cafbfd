"""One mesh and one table that says how every parameter lies on it.

Axes: `data` (copies of the weights), `fsdp` (weights split, batch split), `tensor` (heads and hidden units split).
The table serves policy, anchor, init, Adam moments, task vectors and the reward model: all carry the same leaf paths.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from warp_jax import trees

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# (end of the leaf's path, how its axes are split). Leaves of a stack of layers have the layer axis first.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding", PartitionSpec("tensor", "fsdp")),
    (r"layers(_from_\d+)?/attention/[qkv]/kernel", PartitionSpec(None, "fsdp", "tensor", None)),
    (r"layers(_from_\d+)?/attention/[qkv]/bias", PartitionSpec(None, "tensor", None)),
    (r"layers(_from_\d+)?/attention/o/kernel", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"layers(_from_\d+)?/attention/[qk]_norm/scale", PartitionSpec()),
    (r"layers(_from_\d+)?/mlp/(gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers(_from_\d+)?/mlp/down/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers(_from_\d+)?/(attention|mlp)(_post)?_norm/scale", PartitionSpec()),
    (r"final_norm/scale", PartitionSpec()),
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (r"score/kernel", PartitionSpec("fsdp", None)),
)


def make_mesh(sizes: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor); one size may be -1, which takes the devices that remain."""
    devices = jax.devices() if devices is None else devices
    sizes = list(sizes)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(f"mesh: got sizes {tuple(sizes)}, want one positive size for each of {AXES}, at most one -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // -int(np.prod(sizes)), 1)
    if np.prod(sizes) != len(devices):
        raise ValueError(f"mesh: sizes {tuple(sizes)} make {np.prod(sizes)} devices, this machine has {len(devices)}")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition_spec(name: str, shape: Sequence[int]) -> PartitionSpec:
    """The table's rule for a leaf path; scalars are whole. A path that no rule knows raises ValueError."""
    if not shape:
        return PartitionSpec()
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", name):
            return spec
    raise ValueError(f"sharding: no rule for leaf {name!r} of shape {tuple(shape)}; add one to sharding.RULES")


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes (parameters, TrainState, Adam moments)."""

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = trees.path_name(path)
        spec = partition_spec(name, leaf.shape)
        _check_divisible(mesh, name, leaf.shape, spec)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def with_shardings(mesh: Mesh, shapes: Any) -> Any:
    """The same jax.ShapeDtypeStruct tree with the sharding of every leaf."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, param_shardings(mesh, shapes)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices that hold different data."""
    return NamedSharding(mesh, BATCH)


def batch_devices(mesh: Mesh) -> int:
    """By how much a batch must be divisible."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Host arrays [B, ...] onto the mesh, split over the batch."""
    return jax.device_put(batch, batch_sharding(mesh))


def _check_divisible(mesh: Mesh, name: str, shape: Sequence[int], spec: PartitionSpec) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"sharding: leaf {name!r} has shape {tuple(shape)}; {size} is not divisible by mesh axis "
                f"{axis!r} of size {mesh.shape[axis]}; choose a smaller {axis!r} axis"
            )
