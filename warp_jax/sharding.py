"""One mesh and one table that says how every parameter lies on it.

Axes: `data` (copies of the weights), `fsdp` (weights split, batch split), `tensor` (heads and hidden units split).
The table serves policy, anchor, init, Adam moments, task vectors and the reward model: all carry the same leaf paths.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from warp_jax import trees

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what a batch is split over

# Fewer key-value heads than chips along `tensor` stay whole there: every chip needs the head that its queries share.
KEY_VALUE = r"layers(_from_\d+)?/attention/[kv]/"

# (end of the leaf's path, how its axes are split). Leaves of a stack of layers have the layer axis first.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding", PartitionSpec("tensor", "fsdp")),
    (r"layers(_from_\d+)?/attention/q/kernel", PartitionSpec(None, "fsdp", "tensor", None)),
    (r"layers(_from_\d+)?/attention/q/bias", PartitionSpec(None, "tensor", None)),
    (KEY_VALUE + "kernel", PartitionSpec(None, "fsdp", "tensor", None)),
    (KEY_VALUE + "bias", PartitionSpec(None, "tensor", None)),
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
    return Mesh(_placed(tuple(sizes), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices as a grid: neighbours on TPU are neighbours in the grid, and only `data`, or `fsdp` where `data` is
    too small, goes from one slice to another over the data centre's network.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    over_data = math.gcd(sizes[0], slices)
    between = (over_data, slices // over_data, 1)
    if sizes[1] % between[1]:
        raise ValueError(f"mesh: {slices} slices do not divide data x fsdp of {sizes}; choose sizes that they divide")
    inside = tuple(size // count for size, count in zip(sizes, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


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
        if re.search(KEY_VALUE, name) and mesh.shape["tensor"] % leaf.shape[spec.index("tensor")] == 0:
            spec = divisible(mesh, leaf.shape, spec)
        _check_divisible(mesh, name, leaf.shape, spec)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def decode_shardings(mesh: Mesh, tree: Any) -> Any:
    """As `param_shardings`, but whole along `fsdp`: generation reads every weight for every token."""

    def without_fsdp(leaf: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in leaf.spec)))

    return jax.tree.map(without_fsdp, param_shardings(mesh, tree))


def with_shardings(mesh: Mesh, shapes: Any) -> Any:
    """The same jax.ShapeDtypeStruct tree with the sharding of every leaf."""
    return shaped(shapes, param_shardings(mesh, shapes))


def shaped(shapes: Any, shardings: Any) -> Any:
    """The jax.ShapeDtypeStruct of every leaf with the sharding in the same place of the other tree."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def constrain(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
    """The activation x laid out by `spec`; an axis whose size a mesh axis does not divide stays whole."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, divisible(mesh, x.shape, spec)))


def divisible(mesh: Mesh, shape: Sequence[int], spec: PartitionSpec) -> PartitionSpec:
    """The spec without the splits that `shape` does not allow."""
    return PartitionSpec(*(a if size % _devices(mesh, a) == 0 else None for size, a in zip(shape, spec, strict=False)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices that hold different data."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """By how much a batch must be divisible."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Arrays [B, ...], the same in every process, onto the mesh, split over the batch: each process keeps its rows.

    What is on devices already does not come to the host, which would wait for it.
    """
    rows = batch_sharding(mesh)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and (rows.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, rows)
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, rows, lambda index: values[index])

    return jax.tree.map(put, batch)


def _devices(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    axes = (axis,) if isinstance(axis, str) else axis or ()
    return int(np.prod([mesh.shape[name] for name in axes]))


def _check_divisible(mesh: Mesh, name: str, shape: Sequence[int], spec: PartitionSpec) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"sharding: leaf {name!r} has shape {tuple(shape)}; {size} is not divisible by mesh axis "
                f"{axis!r} of size {mesh.shape[axis]}; choose a smaller {axis!r} axis"
            )
