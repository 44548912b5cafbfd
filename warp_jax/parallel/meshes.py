"""The device mesh and sharding of batches and activations.

Axes: `data` (splits the batch), `fsdp` (splits the batch and the weights), `tensor` (splits heads and hidden units).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # axes that split a batch


def make_mesh(sizes: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh with axes (data, fsdp, tensor); one size may be -1: all remaining devices."""
    devices = jax.devices() if devices is None else devices
    sizes = list(sizes)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(f"mesh: got sizes {tuple(sizes)}, want one positive size for each of {AXES}, at most one -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // -int(np.prod(sizes)), 1)
    if np.prod(sizes) != len(devices):
        raise ValueError(f"mesh: sizes {tuple(sizes)} need {np.prod(sizes)} devices, this machine has {len(devices)}")
    return Mesh(_device_grid(tuple(sizes), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def regroup(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices in the same order, with `tensor` along that axis and the fewer along `fsdp`; 0 = as they are."""
    data, fsdp, before = mesh.devices.shape
    if not tensor:
        return mesh
    if tensor % before or fsdp * before % tensor:
        raise ValueError(
            f"config.sampling.tensor: got {tensor}, want 0, or a multiple of {before} that divides {fsdp * before}: "
            "mesh tensor, and fsdp x tensor"
        )
    return Mesh(mesh.devices.reshape(data, fsdp * before // tensor, tensor), AXES, axis_types=mesh.axis_types)


def _device_grid(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Arrange the devices as a grid in which neighbouring TPU chips are neighbours.

    Traffic between TPU slices is slow, so only `data` spans slices, and `fsdp` if `data` is too small.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data_slices = math.gcd(sizes[0], slices)
    across = (data_slices, slices // data_slices, 1)
    if sizes[1] % across[1]:
        raise ValueError(f"mesh: got sizes {sizes} on {slices} slices, want data x fsdp divisible by {slices}")
    within = tuple(size // count for size, count in zip(sizes, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def constrain(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
    """Shard the activation x by `spec`; an axis that is not divisible stays unsplit. mesh None = return x."""
    if mesh is None:
        return x
    spec = divisible(mesh, x.shape, local(spec))
    # in a shard_map, a bare spec means the mesh around it
    return jax.lax.with_sharding_constraint(x, spec if manual_axes() else NamedSharding(mesh, spec))


def manual_axes() -> tuple[str, ...]:
    """Axes of the `jax.shard_map` that is being traced: its arrays are the parts of one device. () outside of one."""
    return jax.sharding.get_abstract_mesh().manual_axes


def local(spec: PartitionSpec) -> PartitionSpec:
    """The spec of one device's part in a `jax.shard_map` over the batch axes; the same spec outside of one."""
    return PartitionSpec(*(None if axis == BATCH else axis for axis in spec)) if manual_axes() else spec


def map_shards(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, axes: Sequence[str] = AXES
) -> Callable[..., Any]:
    """`jax.shard_map` over `axes`, of which those of a `jax.shard_map` around it are left out."""
    around = manual_axes()
    return jax.shard_map(
        function,
        mesh=None if around else mesh,  # None: that of the other one
        in_specs=jax.tree.map(local, in_specs),
        out_specs=local(out_specs),
        axis_names=set(axes) - set(around),
        check_vma=False,
    )


def divisible(mesh: Mesh, shape: Sequence[int], spec: PartitionSpec) -> PartitionSpec:
    """The spec without the splits that do not divide `shape`."""
    return PartitionSpec(*(a if size % _devices(mesh, a) == 0 else None for size, a in zip(shape, spec, strict=False)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that keeps the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding that splits one axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that a batch is split into; its rows must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(mesh: Mesh, batch: Any, axis: int = 0) -> Any:
    """Shard one axis of arrays over the batch axes. Every process passes full arrays; its devices keep their rows.

    Arrays that are on devices already are not copied to the host, which would wait for them.
    """
    rows = batch_sharding(mesh, axis)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and (rows.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, rows)
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, rows, lambda index: values[index])

    return jax.tree.map(put, batch)


def _devices(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    axes = (axis,) if isinstance(axis, str) else axis or ()
    return int(np.prod([mesh.shape[name] for name in axes]))
