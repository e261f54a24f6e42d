"""The mesh, and the one table that maps logical axes to its axes.

`data` repeats parameters, `fsdp` splits them and the batch, `tensor` splits heads and MLPs (4 KV heads: 1, 2
or 4), `context` splits long packs and, meanwhile, parameters.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis of a parameter -> mesh axes. A name that is missing here is a KeyError, on purpose.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "layers": (),
    "norm": (),                      # small vectors are replicated
    "embed": ("fsdp", "context"),
    "vit_embed": ("fsdp", "context"),  # 1152 = 2^7 * 9: at most 128 ways, see `partition`
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}
BATCH_AXES = ("data", "fsdp")
HOST = "pinned_host"    # the kind of memory that is the host's and that devices copy from and to


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (for one axis) takes what the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1


def parse_mesh(text: str) -> MeshConfig:
    """A mesh as commands take it, "data=4,fsdp=16"; axes left out are 1. Raises: ValueError if it is none."""
    sizes = dict(part.partition("=")[::2] for part in text.split(","))
    if not set(sizes) <= set(MESH_AXES) or not all(size.isdecimal() for size in sizes.values()):
        raise ValueError(f"--mesh is {text!r}; write axes of {', '.join(MESH_AXES)}, like data=4,fsdp=16")
    return MeshConfig(**{"fsdp": 1} | {axis: int(size) for axis, size in sizes.items()})


def find_mesh(text: str) -> Mesh | None:
    """The mesh of `parse_mesh` over all devices; None for "", which leaves the choice to others."""
    return make_mesh(parse_mesh(text)) if text else None


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh; slices of a multi-slice TPU are parts of `data`.

    Raises: ValueError if the axes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({slice_of(device) for device in devices})
    sizes = mesh_sizes(config, len(devices), slices)
    # A mesh axis may be a part of a side of the torus, e.g. 8 of 4 x 4 x 4; `jax.make_mesh` refuses that.
    grid = mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    ) if slices > 1 else mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def slice_of(device: jax.Device) -> int:
    """The slice that a TPU is a part of; other devices have none."""
    return getattr(device, "slice_index", 0)


def make_abstract_mesh(config: MeshConfig, num_devices: int, slices: int = 1) -> AbstractMesh:
    """The same of devices that are not looked for. Raises: as `make_mesh`."""
    return AbstractMesh(tuple(mesh_sizes(config, num_devices, slices)), MESH_AXES,
                        axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(config: MeshConfig, num_devices: int, slices: int) -> list[int]:
    """Devices along each axis. Raises: as `make_mesh`."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {config}: sizes are positive, and at most one is -1")
    sizes = [num_devices // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != num_devices:
        raise ValueError(f"mesh {dict(zip(MESH_AXES, sizes))} needs {math.prod(sizes)} devices, "
                         f"there are {num_devices}")
    if sizes[0] % slices:
        raise ValueError(f"mesh.data is {sizes[0]}; it must be a multiple of the {slices} slices, for what the "
                         "other axes exchange every layer is too much for the network between them")
    return sizes


def partition(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Spec of one parameter. A dimension keeps the mesh axes, in order, that divide it evenly."""
    spec = []
    for name, size in zip(axes, shape, strict=True):
        used = []
        for axis in RULES[name]:
            if size % (mesh.shape[axis] * math.prod(mesh.shape[a] for a in used)) == 0:
                used.append(axis)
        spec.append(tuple(used) or None)
    return PartitionSpec(*spec)


def local_mesh(heads: int) -> Mesh:
    """Devices of this process for what one host does alone: as many as split so many key-value heads evenly."""
    devices = jax.local_devices()
    count = math.gcd(len(devices), heads)
    return Mesh(np.reshape(devices[:count], (1, 1, count, 1)), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Trees of logical axes and of shapes (see `Functional`) -> tree of NamedSharding."""
    return jax.tree.map(lambda shape, names: NamedSharding(mesh, partition(names, shape.shape, mesh)),
                        shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
