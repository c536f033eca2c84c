"""Instructions of the GPU: their kind, the unit that runs them, and how long it is busy.

Which unit runs an opcode is described in the "Pipelines" section of NVIDIA's Nsight Compute
profiling guide: FMA runs FP32 and integer multiplications, ALU the other integers, logic,
comparisons and selections, XU special functions and conversions, LSU memory and shuffles. On the
H100, half of FMA's lanes run integer multiplications.
"""

import re
from functools import cache

from scripts.benchmark.kernel_model.gpus import Gpu

__all__ = ["KINDS", "UNITS", "access_bytes", "kind_of", "mma_macs", "unit_cycles"]

# Patterns of the beginning of an opcode; the first one that matches counts.
_KINDS = {
    "tensor": r"[HIDBQ]MMA|[HIQB]GMMA",
    "MUFU": r"MUFU",
    "FP32": r"F(ADD|MUL|FMA|MNMX|SETP|SET|SEL|CHK|SWZADD)|H(ADD2|MUL2|FMA2|MNMX2|SETP2|SET2)",
    "convert": r"F2F|F2I|I2F|I2FP|F2FP|FRND|F2IP|I2I",
    "shuffle": r"SHFL|REDUX|MATCH|VOTE",
    "shared": r"LDS|STS|ATOMS",
    "local": r"LDL|STL",
    "global": r"LDG(?!DEPBAR)|STG|(LD|ST)(\.|$)|ATOM|RED(\.|$)|UTMA(?!CMDFLUSH)|UBLKCP",
    "control": r"BRA|BRX|EXIT|RET|CALL|BAR|B[SR]|BMOV|BPT|NOP|DEPBAR|LDGDEPBAR|WARP|YIELD|MEMBAR"
    r"|ERRBAR|FENCE|SYNCS|NANOSLEEP|UCGABAR|JMP|KILL|ARRIVES|UTMACMDFLUSH|ELECT|CCTL|ACQ|USETMAXREG",
    "integer": r"I(MAD|ADD|ABS|SETP|MNMX|DP|SCADD)|VI(ADD|MNMX)|VABSDIFF|P?LOP|SHF|SHL|SHR|LEA|SEL"
    r"|PRMT|SGXT|BMSK|POPC|FLO|BREV|P2R|R2P|MOV|U(?!LDC)",
    "other": r"",
}
KINDS = tuple(_KINDS)

_UNITS = {
    "tensor": _KINDS["tensor"],
    "XU": r"MUFU|F2F(?!P)|F2I|I2F(?!P)|FRND|POPC|FLO|BREV",
    "FMA": r"F(ADD|MUL|FMA|SWZADD)|H(ADD2|MUL2|FMA2)",
    "FMA integer": r"IMAD|IDP",
    "LSU": "|".join(_KINDS[kind] for kind in ("shared", "local", "global")) + r"|SHFL",
    # These have units of their own, which are not modeled.
    "": rf"{_KINDS['control']}|U|S2|CS2R|LDC|ULDC|VOTE|MATCH|REDUX|R2UR",
    "ALU": r"",
}
UNITS = tuple(unit for unit in _UNITS if unit)


@cache
def kind_of(opcode: str) -> str:
    """Return the kind of an opcode, one of `KINDS`."""
    return next(kind for kind, pattern in _KINDS.items() if re.match(pattern, opcode))


@cache
def unit_cycles(opcode: str, gpu: Gpu) -> dict[str, float]:
    """Return for how many cycles of a scheduler an instruction of a warp keeps units busy."""
    unit = next(unit for unit, pattern in _UNITS.items() if re.match(pattern, opcode))
    if unit == "":
        return {}
    if unit == "tensor":
        rate = gpu.wgmma if "GMMA" in opcode else gpu.mma_sync
        return {unit: 4 * mma_macs(opcode) / rate}
    if unit == "LSU":
        # Four schedulers share 128 bytes per cycle.
        size = 4 if opcode.startswith("SHFL") else access_bytes(opcode)
        return {unit: 4 * max(1.0, size / 4)}
    if unit == "XU":
        return {unit: 32 / 4}
    if unit == "FMA integer":
        # It runs in 16 lanes of FMA and takes as many of its lanes from FP32.
        return {unit: 2.0, "FMA": 32 / gpu.fma_lanes}
    return {unit: 32 / gpu.fma_lanes if unit == "FMA" else 2.0}


def access_bytes(opcode: str) -> int:
    """Return the bytes that a thread loads or stores with an instruction."""
    if match := re.match(r"(LD|ST)SM\..*?(?:\.([24]))?$", opcode):
        return 4 * int(match[2] or 1)
    if match := re.search(r"\.(128|64)(?!\d)", opcode):
        return int(match[1]) // 8
    return 1 if re.search(r"\.[US]8", opcode) else 2 if re.search(r"\.[US]16", opcode) else 4


@cache
def mma_macs(opcode: str) -> int:
    """Return the multiplications of an instruction of tensor cores, per warp.

    Raises:
        ValueError: The opcode does not name its shape.
    """
    if match := re.match(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)", opcode):
        # Four warps issue it together.
        return int(match[1]) * int(match[2]) * int(match[3]) // 4
    match = re.match(r"[A-Z]MMA\.(8|16)(8)(\d+)\.", opcode)
    if not match:
        raise ValueError(f"the opcode of a tensor core must name its shape, got {opcode}")
    return int(match[1]) * int(match[2]) * int(match[3])
