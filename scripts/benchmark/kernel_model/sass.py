"""Read the disassembly of a kernel: instructions, basic blocks and loops.

A loop is a natural loop of the control flow: a back edge to a block that dominates its source.
Blocks that cannot be reached, such as the trap behind the end, are left out.
"""

import re
from typing import NamedTuple

from scripts.benchmark.kernel_model.opcodes import kind_of
from scripts.benchmark.kernel_model.trip_counts import Place

__all__ = [
    "Block",
    "Instruction",
    "Loop",
    "Program",
    "parse",
]

_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_SOURCE = re.compile(r'"([^"]+)", line (\d+)')
_LABEL = re.compile(r"^(\.L_\w+):")
_BRANCH = re.compile(r"BRA|JMP|CALL|EXIT|RET")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


class Instruction(NamedTuple):
    """An instruction of the machine code.

    Attributes:
        address: Bytes from the beginning of the kernel.
        guard: Predicate with its `@`, or an empty text.
        opcode: Opcode with its modifiers.
        operands: Operands as text.
        place: Lines of the source that the instruction belongs to.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    place: Place

    @property
    def kind(self) -> str:
        """Kind of the instruction, one of `KINDS`."""
        return kind_of(self.opcode)


class Block(NamedTuple):
    """A basic block: its instructions, and the numbers of the blocks that can follow."""

    instructions: list[Instruction]
    following: list[int]


class Loop(NamedTuple):
    """A loop of the machine code.

    Attributes:
        header: Number of the first block.
        blocks: Numbers of all blocks, also those of inner loops.
        latches: Numbers of the blocks with a back edge.
        parent: Position of the enclosing loop in the list of loops, or -1.
    """

    header: int
    blocks: frozenset[int]
    latches: frozenset[int]
    parent: int


class Program(NamedTuple):
    """Control flow of a kernel, without blocks that cannot be reached."""

    blocks: dict[int, Block]
    dominators: dict[int, set[int]]
    loops: list[Loop]

    def innermost(self, block: int) -> int:
        """Return the position of the innermost loop with a block, or -1."""
        inside = [n for n, loop in enumerate(self.loops) if block in loop.blocks]
        return min(inside, key=lambda n: len(self.loops[n].blocks), default=-1)


def parse(text: str) -> Program:
    """Read a disassembly of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: list[str] = []
    place: Place = ()
    for line in text.splitlines():
        if line.lstrip().startswith("//## File"):
            lines.append(line)
        elif label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif match := _LINE.search(line):
            if lines:
                place, lines = _place(lines), []
            operands = tuple(x.strip() for x in match["rest"].split(",")) if match["rest"] else ()
            guard = (match["guard"] or "").strip()
            instructions.append(
                Instruction(int(match["address"], 16), guard, match["opcode"], operands, place)
            )
    return _program(_blocks(instructions, labels))


def _place(lines: list[str]) -> Place:
    """Return the place that comments name: one comment per call, innermost first."""
    found = [_SOURCE.search(line) for line in reversed(lines)]
    return tuple((match[1], int(match[2])) for match in found if match)


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> dict[int, Block]:
    """Split instructions into basic blocks, which are numbered by their first instruction."""
    starts = {0, *labels.values()}
    for n, instruction in enumerate(instructions):
        if _BRANCH.match(instruction.opcode):
            starts.add(n + 1)
    ordered = sorted(n for n in starts if n < len(instructions))
    blocks = {}
    for start, end in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
        last = instructions[end - 1]
        guarded = last.guard not in ("", "@PT", "@!UPT") or _conditional(last)
        following = [end] if end < len(instructions) else []
        if re.match(r"EXIT|RET", last.opcode):
            following = following if guarded else []
        elif _BRANCH.match(last.opcode):
            # A call of a label in the kernel is a branch. Calls of functions return.
            target = _TARGET.search(", ".join(last.operands))
            # `BRA.DIV` is taken by a warp whose threads have separated, which these kernels avoid.
            if target and target[1] in labels and not last.opcode.startswith("BRA.DIV"):
                following = [labels[target[1]], *(following if guarded else [])]
        blocks[start] = Block(instructions[start:end], following)
    return blocks


def _conditional(branch: Instruction) -> bool:
    """Return whether a branch has a predicate among its operands, such as `BRA.U UP0, ...`."""
    return bool(re.match(r"BRA", branch.opcode)) and any(
        re.fullmatch(r"!?U?P\d", operand) for operand in branch.operands
    )


def _program(blocks: dict[int, Block]) -> Program:
    """Find the blocks that can be reached, their dominators and the natural loops."""
    reached, waiting = set(), [0]
    while waiting:
        n = waiting.pop()
        if n not in reached:
            reached.add(n)
            waiting += blocks[n].following
    blocks = {n: block for n, block in blocks.items() if n in reached}
    before: dict[int, set[int]] = {n: set() for n in blocks}
    for n, block in blocks.items():
        for after in block.following:
            before[after].add(n)
    dominators = {n: set(blocks) for n in blocks} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in sorted(blocks):
            if n == 0:
                continue
            new = {n} | set.intersection(*(dominators[m] for m in before[n]))
            changed |= new != dominators[n]
            dominators[n] = new
    bodies: dict[int, set[int]] = {}
    latches: dict[int, set[int]] = {}
    for n, block in blocks.items():
        for header in block.following:
            if header in dominators[n]:
                body, waiting = bodies.setdefault(header, {header}), [n]
                latches.setdefault(header, set()).add(n)
                while waiting:
                    m = waiting.pop()
                    if m not in body:
                        body.add(m)
                        waiting += before[m]
    # A block without an edge to a header, in the order of the code, is a plain trap at the end.
    headers = sorted(bodies, key=lambda header: (-len(bodies[header]), header))
    loops: list[Loop] = []
    for header in headers:
        outer = [n for n, loop in enumerate(loops) if header in loop.blocks]
        parent = min(outer, key=lambda n: len(loops[n].blocks), default=-1)
        loops.append(Loop(header, frozenset(bodies[header]), frozenset(latches[header]), parent))
    return Program(blocks, dominators, loops)
