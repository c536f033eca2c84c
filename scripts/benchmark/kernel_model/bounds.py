"""Bounds on the time of one launch, from its machine code and the trips of its loops."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmark.kernel_model import sass
from scripts.benchmark.kernel_model.gpus import GPUS, programs_per_sm
from scripts.benchmark.kernel_model.latency import warp_cycles
from scripts.benchmark.kernel_model.launches import Launch, compile_launch
from scripts.benchmark.kernel_model.trip_counts import ROOT, Counts

__all__ = ["estimate", "memory_bytes"]


def estimate(launch: Launch, counts: Counts, architecture: int, pairs: int) -> dict[str, Any]:
    """Compile a launch and return its resources, instructions per pair and bounds.

    Args:
        launch: Launch at the sizes of the whole layer.
        counts: Trips of its loops.
        architecture: 80 or 90.
        pairs: Pairs of a query and a key in the layer.
    """
    gpu = GPUS[architecture]
    compiled = compile_launch(launch, architecture)
    program = sass.parse(sass.disassemble(compiled.asm["cubin"]))
    weights = sass.weigh(program, counts)
    per_warp = dict.fromkeys(sass.KINDS, 0.0)
    macs = requested = 0.0
    for b, block in program.blocks.items():
        for x in block.instructions:
            per_warp[x.kind] += weights.blocks[b]
            if x.kind == "tensor":
                macs += weights.blocks[b] * sass.mma_macs(x.opcode)
            if x.kind == "global":
                requested += weights.blocks[b] * 32 * sass.access_bytes(x.opcode)
    warps = launch.num_warps
    registers = _registers(compiled.asm["cubin"])
    resident = programs_per_sm(gpu, registers, compiled.metadata.shared, warps)
    schedulers = 4 * gpu.sms * gpu.clock
    all_warps = warps * launch.programs
    units = {kind: n * gpu.cycles[kind] for kind, n in per_warp.items() if kind in gpu.cycles}
    units["tensor"] = macs * 4 / gpu.mma
    busiest = max(units, key=units.get)
    cycles = warp_cycles(program, weights)
    moved = memory_bytes(launch)
    bounds = {
        "issue": 1e6 * sum(per_warp.values()) * all_warps / schedulers,
        "unit": 1e6 * units[busiest] * all_warps / schedulers,
        "latency": 1e6 * cycles * launch.programs / (max(1, resident) * gpu.sms * gpu.clock),
        "memory": 1e6 * moved / gpu.memory,
    }
    return {
        "programs": launch.programs,
        "warps": warps,
        "registers": registers,
        "shared_bytes": compiled.metadata.shared,
        "spill_instructions": sum(
            x.kind == "local" for block in program.blocks.values() for x in block.instructions
        ),
        "programs_per_sm": resident,
        "warps_per_sm": resident * warps,
        "per_pair": {k: round(n * 32 * all_warps / pairs, 3) for k, n in per_warp.items()},
        "instructions_per_pair": round(sum(per_warp.values()) * 32 * all_warps / pairs, 2),
        "busiest_unit": busiest,
        "microseconds": {name: round(x, 2) for name, x in bounds.items()},
        "bound": max(bounds, key=bounds.get),
        "estimate_us": round(max(bounds.values()), 2),
        "memory_bytes": moved,
        "requested_bytes": round(requested * all_warps),
        # 1 if every multiplication of `tl.dot` is in the machine code once, at the right trips.
        "mma_over_dot": round(macs * warps * counts.programs / counts.macs, 4)
        if counts.macs
        else None,
        "loops": [_loop(x) for x in weights.loops],
        "warnings": weights.warnings,
    }


def memory_bytes(launch: Launch) -> int:
    """Return the bytes of all tensors of a launch, each once."""
    tensors = {
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.dtype): x
        for x in launch.arguments.values()
        if isinstance(x, Tensor)
    }
    return sum(
        _elements(x) * torch.empty((), dtype=x.dtype).element_size() for x in tensors.values()
    )


def _elements(x: Tensor) -> int:
    """Return the elements of a tensor in memory; expanded dimensions have one."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


def _registers(cubin: bytes) -> int:
    """Return the registers per thread."""
    import re

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"REG:(\d+)", output)[1])


def _loop(x: sass.Trips) -> dict[str, Any]:
    """Return the trips of a loop in types of JSON."""
    source = None
    if x.source:
        source = " > ".join(f"{_short(name)}:{line}" for name, line in x.source)
    trips = round(x.source_trips, 3)
    return {
        "address": hex(x.address),
        "source": source,
        "trips_of_source": trips,
        "copies_of_body": x.copies,
        "trips": round(x.trips, 3),
    }


def _short(name: str) -> str:
    """Return the path of a file within the repository."""
    path = Path(name)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
