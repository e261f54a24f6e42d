"""TPU slices by name: what a chip can do, and devices to compile for on a machine that has none.

A slice is named by its shape, `v5p:4x4x4`, or as Cloud TPU sells it, `v5p-128`: there v4 and v5p count cores,
two a chip, and v5e and v6e count chips. `2xv5p-128` are two of them, joined by the data centre's network.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

# Google Cloud's slices in the order of their sizes; a 3-D slice is a torus where its sides are multiples of 4.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
         "16x16x16")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one chip.

    Compute and memory bandwidth are those of `jax/_src/pallas/mosaic/tpu_info.py`, memory is what libtpu
    0.0.42 lets a program use ("exceeds available HBM"), links are those of `jax-ml/scaling-book`, tpus.md.
    """

    flops: float            # dense bf16 operations a second
    hbm_gib: float          # usable
    hbm_bandwidth: float    # bytes a second
    link_bandwidth: float   # bytes a second, one way, of one link to a neighbour
    links: int
    cores_in_name: int      # what the number of a Cloud TPU name counts, a chip
    slices: tuple[str, ...]

    @property
    def network_bandwidth(self) -> float:
        """Bytes a second that a chip can send, all links together."""
        return self.link_bandwidth * self.links


CHIPS = {
    "v4": Chip(275e12, 30.5, 1.23e12, 45e9, 6, 2, SOLID),
    "v5e": Chip(197e12, 15.75, 0.82e12, 45e9, 4, 1, FLAT),
    "v5p": Chip(459e12, 95.74, 2.46e12, 90e9, 6, 2, SOLID),
    "v6e": Chip(920e12, 31.25, 1.64e12, 90e9, 4, 1, FLAT),
}


# Dense bf16 operations a second of GPUs, from NVIDIA's data sheets (without sparsity).
GPU_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def peak_flops(device_kind: str) -> float | None:
    """Of one device, by what JAX calls it; None of one that is not known, as a CPU."""
    names = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p",
             "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
    if device_kind in names:
        return CHIPS[names[device_kind]].flops
    return next((flops for name, flops in GPU_FLOPS.items() if name in device_kind), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Equal slices: the generation of their chips, the sides of one in chips, and how many they are."""

    generation: str
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """By its shape: `v5p:4x4x4`, `2xv5p:4x4x4`."""
        return self._several(self.slice_name)

    @property
    def slice_name(self) -> str:
        """As libtpu names one slice."""
        return f"{self.generation}:{'x'.join(map(str, self.sides))}"

    @property
    def cloud_name(self) -> str:
        """As Cloud TPU names it: `v5p-128`, `2xv5p-128`."""
        return self._several(f"{self.generation}-{math.prod(self.sides) * self.chip.cores_in_name}")

    def _several(self, name: str) -> str:
        return name if self.slices == 1 else f"{self.slices}x{name}"

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.sides)

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]


def find_topology(name: str) -> Topology:
    """The slice of a name of either kind.

    Raises: ValueError naming what comes near.
    """
    if several := re.fullmatch(r"([1-9]\d*)x(\w+[:-].*)", name):
        return dataclasses.replace(find_topology(several[2]), slices=int(several[1]))
    shape = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if shape and shape[1] in CHIPS:
        sides = tuple(map(int, shape[2].split("x")))
        if 0 not in sides and len(sides) == CHIPS[shape[1]].slices[0].count("x") + 1:
            return Topology(shape[1], sides)
    known = _slices()
    cloud = name.replace("v5litepod-", "v5e-")
    if cloud in known:
        return known[cloud]
    names = [*known, *(topology.name for topology in known.values())]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    raise ValueError(f"topology {name!r} is no slice of {', '.join(CHIPS)}; "
                     + (f"did you mean {' or '.join(near)}?" if near else "use e.g. v5p:4x4x4 or v5p-128"))


def _slices() -> dict[str, Topology]:
    table = [Topology(generation, tuple(map(int, sides.split("x"))))
             for generation, chip in CHIPS.items() for sides in chip.slices]
    return {topology.cloud_name: topology for topology in table}


def compile_devices(topology: Topology) -> list[jax.Device]:
    """Devices that programs can be compiled for; nothing can run on them.

    Raises: ValueError if libtpu is not installed, or knows no such slice.
    """
    # Before libtpu is loaded: it shall neither ask Google's metadata server what machine this is, nor refuse to
    # load beside another process that has it.
    one = dataclasses.replace(topology, slices=1)
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                "TPU_ACCELERATOR_TYPE": one.cloud_name, "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for TPUs needs the package libtpu; bash launch/test.sh puts it where "
                         "PYTHONPATH=.venv/libtpu finds it")
    options = {"chip_config_name": "megacore"} if topology.generation == "v4" else {}  # one device a chip
    if math.prod(topology.sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)    # else a host has four
    try:
        return topologies.get_topology_desc(topology.slice_name, platform="tpu", num_slices=topology.slices,
                                            **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"libtpu makes no topology {topology.name!r}: {str(error).partition(chr(10))[0]}"
                         ) from error
