"""The mesh of devices, and arrays laid out on it.

Axes: `data` (copies of the weights), `fsdp` (weights split, batch split), `tensor` (heads and hidden units split).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what a batch is split over


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
