"""Compiles a program for devices that are not there, and tells what it will need of them."""

import dataclasses
import math
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from irg_jax.parallel.collectives import (
    Collective,
    Work,
    find_collectives,
    measure_work,
    total_by_group,
    total_by_kind,
)
from irg_jax.parallel.flops import Flops
from irg_jax.parallel.hlo import Module
from irg_jax.parallel.sharding import HOST
from irg_jax.parallel.topologies import Chip, Topology

GIB = 2**30
MEMORY_REPORT = "*.after_optimizations-memory-usage-report.txt"


@dataclasses.dataclass(frozen=True)
class Report:
    """Of one device; bytes."""

    seconds: float             # of compilation
    fits: bool                 # in the compiler's judgement
    arguments: int             # what a step is given; results are mostly written in their place
    temporaries: int
    peak: int                  # arguments, new results and temporaries, by XLA's account of the program
    planned: int               # what the compiler has laid out, by which it takes or refuses it
    largest: tuple[str, ...]   # of the temporaries: size and shapes, the largest first
    collectives: tuple[Collective, ...]
    work: Work

    def roofline(self, chip: Chip, kernel_flops: float = 0.0) -> dict[str, float]:
        """Seconds a run takes at least if nothing but one limit held; all links of a chip are taken as busy.

        Args: kernel_flops are those of Pallas kernels on one device, which HLO does not show.
        """
        return {"compute": (self.work.flops + kernel_flops) / chip.flops,
                "hbm": self.work.hbm_bytes / chip.hbm_bandwidth,
                "network": sum(total_by_kind(self.collectives).values()) / chip.network_bandwidth}


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings, as arguments to trace with: nothing is allocated."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes,
                        shardings)


def device_bytes(arguments: Any, *, on_host: bool = False) -> int:
    """Of abstract arrays, what lies on one device, or of its share in the host's memory.

    A layout's padding is left out.
    """
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(arguments) if (x.sharding.memory_kind == HOST) == on_host)


def compile_report(traced: jax.stages.Traced, arguments: Any, num_devices: int) -> Report:
    """Compiles for TPUs what was traced with `arguments`.

    A program that does not fit is reported all the same: the compiler has planned its memory by then.
    Raises: jax.errors.JaxRuntimeError if the compiler refuses it for another reason.
    """
    start, compiled = time.monotonic(), None
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        try:
            compiled = traced.lower(lowering_platforms=("tpu",)).compile({"xla_dump_to": str(folder)})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or not any(folder.glob(MEMORY_REPORT)):
                raise
        seconds = time.monotonic() - start
        whole, largest = read_memory(_read(folder, MEMORY_REPORT))
        module = Module(_read(folder, "*.after_optimizations.txt"))
    kept, fresh = device_bytes(arguments), 0
    temporaries = whole - kept
    if compiled is not None:
        memory = compiled.memory_analysis()
        kept, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Report(seconds, compiled is not None, kept, temporaries, kept + fresh + temporaries, whole, largest,
                  tuple(find_collectives(module, num_devices)), measure_work(module))


def read_memory(report: str) -> tuple[int, tuple[str, ...]]:
    """Bytes of HBM, arguments counted, from the compiler's own report, and its five largest temporaries.

    Raises: ValueError if it has another form than that of libtpu 0.0.42.
    """
    total = re.search(r"Total bytes: (\d+)", report)
    if total is None:
        raise ValueError(f"the compiler's memory report cannot be read: {report[:200]!r}")
    blocks = [re.findall(r"^ *[\d.]+\w+\( *\d+%\); +([\d.]+\w+); +\d+; +\d+; (.*)$", block, re.MULTILINE)
              for block in report.split("cumulative_size;")]
    rows = max(blocks, key=len)    # of a program that fits, each argument has a block of its own
    return int(total[1]), tuple(f"{size}: {shapes[:120]}" for size, shapes in rows[:5])


def _read(folder: pathlib.Path, pattern: str) -> str:
    (path,) = folder.glob(pattern)
    return path.read_text(encoding="utf-8")


def summarize(report: Report, topology: Topology, useful: float, executed: Flops) -> dict[str, Any]:
    """Memory, work and the best that can be reached; GiB and seconds are a chip's, operations all chips'.

    Args: useful operations are what nobody could save; executed ones are those of the traced program.
    """
    chip, chips = topology.chip, topology.num_chips
    roofline = report.roofline(chip, executed.kernel / chips)
    return {
        "temp_gib": report.temporaries / GIB, "peak_hbm_gib": report.peak / GIB,
        "planned_hbm_gib": report.planned / GIB, "hbm_gib": chip.hbm_gib, "fits": report.fits,
        "largest_temporaries": list(report.largest),
        "model_flops": useful, "executed_flops": executed.total, "executed_by": dataclasses.asdict(executed),
        "recompute_ratio": executed.total / useful,
        # Above 1 if chips do the same work: what the compiled program does on a chip, over its share.
        "replication": report.work.flops * chips / (executed.dot + executed.conv),
        "collective_gib": {kind: size / GIB for kind, size in total_by_kind(report.collectives).items()},
        "collective_groups_gib": {name: size / GIB
                                  for name, size in total_by_group(report.collectives).items()},
        "async_collectives": f"{sum(x.is_async for x in report.collectives)} of {len(report.collectives)}",
        "roofline_seconds": roofline,
        # The compiler leaves out what nobody reads, a thousandth: that makes no chip faster than its peak.
        "mfu_bound": min(1.0, useful / chips / chip.flops / max(roofline.values())),
        "compile_seconds": report.seconds,
    }


def rounded(value: Any) -> Any:
    """The same record with floats of four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value
