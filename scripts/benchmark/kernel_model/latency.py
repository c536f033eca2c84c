"""Time of one warp alone on an SM: the critical path of its instructions.

A warp issues in order, one instruction per clock. An instruction waits until its operands are
there, which is some cycles after the instruction that writes them, by kind. The cycles are rounded
from published microbenchmarks (Abdelkhalik et al., "Demystifying the Nvidia Ampere Architecture
through Microbenchmarking", 2022; Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture", 2024). Loads of global memory take those of a hit in L2. A loop is followed for three
trips, and the last one counts, so a value that one trip passes to the next is waited for. Blocks of
a loop are followed in the order of the code, without its inner loops.
"""

import re

from scripts.benchmark.kernel_model.opcodes import access_bytes
from scripts.benchmark.kernel_model.sass import Instruction, Program
from scripts.benchmark.kernel_model.weights import Weights

__all__ = ["LATENCY", "warp_cycles"]

LATENCY = {
    "tensor": 33,
    "MUFU": 22,
    "FP32": 4,
    "convert": 12,
    "shuffle": 24,
    "shared": 29,
    "local": 40,
    "global": 250,
    "control": 4,
    "integer": 5,
    "other": 12,
}
_BARRIER = 20
_REGISTER = re.compile(r"\b(U?[RP]\d+)(\.64)?\b")


def warp_cycles(program: Program, weights: Weights) -> float:
    """Return the cycles of one warp from the beginning to the end of a program."""
    total = 0.0
    for n in range(-1, len(program.loops)):
        runs = weights.loops[n].trips if n >= 0 else 1.0
        body: list[Instruction] = []
        for b in sorted(program.blocks):
            # Blocks that most trips skip are left out.
            if program.innermost(b) == n and weights.blocks[b] >= 0.5 * runs:
                body += program.blocks[b].instructions
        total += runs * (_follow(body, 3 if n >= 0 else 1))
    return total


def _follow(body: list[Instruction], trips: int) -> float:
    """Return the cycles of the last of some trips."""
    ready: dict[str, float] = {}
    groups: list[float] = []
    copies = clock = before = 0.0
    for _ in range(trips):
        before = clock
        for x in body:
            written, read = _registers(x)
            clock = max([clock, *(ready.get(name, 0.0) for name in read)]) + 1
            latency = LATENCY[x.kind]
            if x.opcode.startswith("LDGSTS"):
                copies = clock + latency
            elif x.opcode.startswith("LDGDEPBAR"):
                groups.append(copies)
            elif x.opcode.startswith("DEPBAR"):
                allowed = int(x.operands[1], 16) if len(x.operands) > 1 else 0
                done = groups[: len(groups) - allowed]
                clock = max([clock, *done])
            elif re.match(r"[A-Z]GMMA", x.opcode):
                # Asynchronous: each keeps the tensor cores busy, and a wait follows.
                columns = int(re.search(r"x(\d+)x", x.opcode)[1])
                copies = max(copies, clock) + max(16, columns / 2)
                groups.append(copies + 16)
            elif re.match(r"WARPGROUP\.DEPBAR", x.opcode):
                allowed = int(x.operands[-1], 16)
                clock = max([clock, *groups[: len(groups) - allowed]])
            elif x.opcode.startswith("BAR"):
                clock += _BARRIER
            for name in written:
                ready[name] = clock + latency
    return clock - before


def _registers(x: Instruction) -> tuple[list[str], list[str]]:
    """Return the registers that an instruction writes and reads."""
    stores = re.match(r"ST|RED|BRA|EXIT|BAR|WARP|UTMA|LDGSTS|CALL", x.opcode) is not None
    count = 0 if stores else 2 if re.match(r"[A-Z]+SETP|PLOP3|R2P|SHFL", x.opcode) else 1
    width = _width(x)
    written: list[str] = []
    for operand in x.operands[:count]:
        written += _expand(operand, width)
    if re.match(r"IADD3|LEA|IMAD|UIADD3|ULEA|LOP3|ULOP3", x.opcode):
        # Carries and predicates follow the result.
        written += [y for y in x.operands[1:3] if re.fullmatch(r"U?P\d", y)]
    read = re.findall(r"U?P\d", x.guard)
    is_mma = "MMA" in x.opcode
    for position, operand in enumerate(x.operands[count:]):
        wide = (4, 2, 4)[position] if is_mma and position < 3 else 1
        if stores and position > 0:
            wide = width
        read += _expand(operand, wide)
    return written, read


def _width(x: Instruction) -> int:
    """Return how many consecutive registers an instruction writes, or stores."""
    if "MMA" in x.opcode:
        return 4
    if x.kind in ("shared", "global", "local"):
        return max(1, access_bytes(x.opcode) // 4)
    return 2 if ".64" in x.opcode or ".WIDE" in x.opcode or x.opcode.startswith("CS2R") else 1


def _expand(operand: str, width: int) -> list[str]:
    """Return the registers of an operand, whose first is named."""
    found = []
    for name, wide in _REGISTER.findall(operand):
        number = int(name.lstrip("URP"))
        prefix = name[: len(name) - len(str(number))]
        length = max(width, 2 if wide else 1) if not prefix.endswith("P") else 1
        found += [f"{prefix}{number + n}" for n in range(length)]
    return found
