"""GPUs of the model: rates and sizes of an SM, from NVIDIA's documents.

Sources: the tables "Arithmetic Instructions" and "Technical Specifications per Compute Capability"
of the CUDA C++ Programming Guide, and the white papers of the A100 and the H100.
"""

from typing import NamedTuple

__all__ = ["GPUS", "Gpu", "programs_per_sm"]


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
        name: Product.
        sms: Number of SMs.
        clock: Boost clock in Hz.
        memory: Bandwidth of the memory in bytes per second.
        shared: Shared memory of an SM in bytes.
        mma: Multiplications of tensor cores per clock and SM, for bfloat16.
        cycles: Cycles for which a warp instruction keeps its unit of a scheduler busy, by kind.
    """

    name: str
    sms: int
    clock: float
    memory: float
    shared: int
    mma: int
    cycles: dict[str, float]


# Units shared by the four schedulers of an SM, at 16 or 32 lanes per clock and SM.
_CYCLES = {"MUFU": 8, "shuffle": 4, "shared": 4, "global": 4, "local": 4}
GPUS = {
    80: Gpu(
        "A100 SXM 80 GB", 108, 1.41e9, 2.039e12, 164 * 1024, 1024,
        _CYCLES | {"FP32": 2, "integer": 2, "convert": 8},
    ),
    90: Gpu(
        "H100 SXM", 132, 1.755e9, 3.35e12, 228 * 1024, 2048,
        _CYCLES | {"FP32": 1, "integer": 2, "convert": 2},
    ),
}  # fmt: skip
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32
# CUDA reserves shared memory for itself in every program.
_RESERVED = 1024


def programs_per_sm(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """Return how many programs are resident on an SM at a time.

    Args:
        gpu: GPU.
        registers: Registers per thread.
        shared: Shared memory of a program in bytes.
        warps: Warps of a program.
    """
    # Registers of a warp are allocated in units of 256, shared memory in units of 128 bytes.
    per_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = _REGISTERS // 4 // per_warp * 4
    per_program = -(-shared // 128) * 128 + _RESERVED
    limits = (_WARPS // warps, warps_by_registers // warps, gpu.shared // per_program, _PROGRAMS)
    return min(limits)
