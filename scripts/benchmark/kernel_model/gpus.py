"""GPUs of the model, and how many programs an SM holds.

Rates are those of NVIDIA's white papers of the A100 and the H100 and of the throughput table in the
CUDA C++ Programming Guide. `mma.sync` reaches about 0.63 of the peak of an H100, `wgmma` the peak
(Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking", 2024).
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
        mma_sync: Multiplications by `mma.sync` per clock and SM, for bfloat16 and float16.
        wgmma: Multiplications by `wgmma` per clock and SM, for bfloat16 and float16.
        fma_lanes: Lanes of a scheduler for FP32.
    """

    name: str
    sms: int
    clock: float
    memory: float
    shared: int
    mma_sync: float
    wgmma: float
    fma_lanes: int


GPUS = {
    80: Gpu("A100 SXM 80 GB", 108, 1.41e9, 2.039e12, 164 * 1024, 1024, 1024, 16),
    90: Gpu("H100 SXM", 132, 1.755e9, 3.35e12, 228 * 1024, 0.63 * 2048, 2048, 32),
}
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32
# CUDA reserves shared memory for itself in every program.
_RESERVED = 1024


def programs_per_sm(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """Return how many programs an SM holds at a time.

    Args:
        gpu: GPU.
        registers: Registers per thread.
        shared: Shared memory of a program in bytes.
        warps: Warps of a program.
    """
    # A warp gets registers in units of 256, from the quarter of its scheduler. A program gets
    # shared memory in units of 128 bytes.
    per_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = _REGISTERS // 4 // per_warp * 4
    per_program = -(-shared // 128) * 128 + _RESERVED
    limits = (_WARPS // warps, warps_by_registers // warps, gpu.shared // per_program, _PROGRAMS)
    return min(limits)
