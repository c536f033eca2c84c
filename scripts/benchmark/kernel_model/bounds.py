"""Bounds on the time of one launch, from its machine code and the trips of its loops."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from scripts.benchmark.kernel_model.gpus import GPUS, Gpu, programs_per_sm
from scripts.benchmark.kernel_model.latency import warp_cycles
from scripts.benchmark.kernel_model.launches import Launch, Work, compile_launch, tensor_bytes
from scripts.benchmark.kernel_model.opcodes import (
    KINDS,
    access_bytes,
    kind_of,
    mma_macs,
    unit_cycles,
)
from scripts.benchmark.kernel_model.sass import parse
from scripts.benchmark.kernel_model.trip_counts import ROOT, Counts
from scripts.benchmark.kernel_model.weights import Trips, weigh

__all__ = ["BOUNDS", "estimate", "estimate_torch"]

BOUNDS = ("issue", "unit", "latency", "memory")


def estimate(launch: Launch, counts: Counts, gpu: Gpu, pairs: int) -> dict[str, Any]:
    """Compile a launch, and return its resources, instructions per pair and bounds.

    Args:
        launch: Launch at the sizes of the whole layer.
        counts: Trips of its loops.
        gpu: GPU.
        pairs: Pairs of a query and a key in the layer.
    """
    architecture = next(number for number, other in GPUS.items() if other == gpu)
    compiled = compile_launch(launch, architecture)
    cubin = compiled.asm["cubin"]
    program = parse(_tool("nvdisasm", cubin, "-c", "-gi"))
    weights = weigh(program, counts)
    # Runs of every opcode, per warp.
    runs: Counter[str] = Counter()
    for b, block in program.blocks.items():
        for x in block.instructions:
            runs[x.opcode] += weights.blocks[b]
    kinds = dict.fromkeys(KINDS, 0.0)
    units: Counter[str] = Counter()
    macs = requested = 0.0
    for opcode, times in runs.items():
        kind = kind_of(opcode)
        kinds[kind] += times
        for unit, cycles in unit_cycles(opcode, gpu).items():
            units[unit] += times * cycles
        macs += times * mma_macs(opcode) if kind == "tensor" else 0
        requested += times * 32 * access_bytes(opcode) if kind == "global" else 0
    warps, shared = launch.num_warps, compiled.metadata.shared
    registers = int(re.search(r"REG:(\d+)", _tool("cuobjdump", cubin, "--dump-resource-usage"))[1])
    resident = programs_per_sm(gpu, registers, shared, warps)
    busiest = max(units, key=units.get)
    moved = launch_bytes(launch)
    # The busiest SM has this many warps per scheduler, and gets its programs in so many waves.
    per_scheduler = -(-launch.programs // gpu.sms) * warps / 4
    waves = -(-launch.programs // (gpu.sms * max(1, resident)))
    bounds = {
        "issue": sum(kinds.values()) * per_scheduler / gpu.clock,
        "unit": units[busiest] * per_scheduler / gpu.clock,
        "latency": warp_cycles(program, weights) * waves / gpu.clock,
        "memory": moved / gpu.memory,
    }
    threads = 32 * warps * launch.programs / pairs
    ratio = _ratio(macs * warps, counts)
    warnings = list(weights.warnings)
    if ratio is not None and abs(ratio - 1) > 1e-3:
        warnings.append(f"the machine code multiplies {ratio} times as often as `tl.dot`")
    return {
        "programs": launch.programs,
        "warps": warps,
        "registers": registers,
        "shared_bytes": shared,
        "spill_instructions": sum(
            x.kind == "local" for block in program.blocks.values() for x in block.instructions
        ),
        "programs_per_sm": resident,
        "warps_per_sm": resident * warps,
        "per_pair": {kind: round(times * threads, 3) for kind, times in kinds.items()},
        "instructions_per_pair": round(sum(kinds.values()) * threads, 2),
        "busiest_unit": busiest,
        "microseconds": {name: round(1e6 * x, 2) for name, x in bounds.items()},
        "memory_bytes": moved,
        "requested_bytes": round(requested * warps * launch.programs),
        "mma_over_dot": ratio,
        "loops": [_loop(x) for x in weights.loops],
        "warnings": warnings,
    }


def estimate_torch(work: Work, gpu: Gpu) -> dict[str, Any]:
    """Return the bounds of torch's operators around the kernels, one after the other."""
    seconds = {
        "memory": work.bytes / gpu.memory,
        "unit": work.macs / gpu.wgmma / gpu.sms / gpu.clock,
    }
    times = {name: round(1e6 * seconds.get(name, 0.0), 2) for name in BOUNDS}
    return {"operators": work.operators, "memory_bytes": work.bytes, "microseconds": times}


def launch_bytes(launch: Launch) -> int:
    """Return the bytes of all tensors of a launch, each once."""
    tensors = {
        (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.dtype): x
        for x in launch.arguments.values()
        if isinstance(x, Tensor)
    }
    return sum(map(tensor_bytes, tensors.values()))


def _ratio(macs: float, counts: Counts) -> float | None:
    """Return multiplications of the machine code over those of `tl.dot`, per program."""
    return round(macs * counts.programs / counts.macs, 4) if counts.macs else None


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """Return the output of a tool of NVIDIA, which comes with Triton, for a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(tool), *options, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _loop(x: Trips) -> dict[str, Any]:
    """Return the trips of a loop in types of JSON, with the line of its source."""
    found: dict[str, Any] = {"address": hex(x.address), "source": None, "code": None}
    if x.source:
        found["source"] = " > ".join(f"{_short(name)}:{line}" for name, line in x.source)
        name, line = x.source[-1]
        found["code"] = Path(name).read_text().splitlines()[line - 1].strip()
    found["trips_of_source"] = round(x.source_trips, 3)
    return found | {"copies_of_body": x.copies, "trips": round(x.trips, 3)}


def _short(name: str) -> str:
    """Return the path of a file within the repository."""
    path = Path(name)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
