"""Count how often the blocks of the machine code run, per program.

A loop of the machine code has the trips of the loop in the source whose body its instructions
belong to by the debug information (`trip_counts`). ptxas unrolls some loops: then one loop of the
machine code holds several copies of the body, and a second one runs the remaining trips. Blocks
that every trip passes run once per trip. A block that some trips skip runs as often as the branch
of the source it belongs to, and once per trip if it belongs to none, which is rather too often.
"""

import ast
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from scripts.benchmark.kernel_model.sass import Instruction, Program
from scripts.benchmark.kernel_model.trip_counts import Counts, Place

__all__ = ["Trips", "Weights", "weigh"]


@cache
def _source_tree(name: str) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(Path(name).read_text())


@cache
def _nest(name: str, line: int) -> tuple[tuple[tuple[int, bool], ...], int]:
    """Return the loops around a line, with whether each is unrolled, and its innermost branch.

    The branch is the line of its first statement, or 0 without one inside the innermost loop.
    """
    loops: list[tuple[int, bool]] = []
    branch = 0
    for node in ast.walk(_source_tree(name)):
        bodies = [x for x in (getattr(node, "body", None), getattr(node, "orelse", None)) if x]
        if not isinstance(node, ast.For | ast.While | ast.If):
            continue
        for body in bodies:
            if body[0].lineno <= line <= body[-1].end_lineno:
                if isinstance(node, ast.If):
                    # `elif` is a branch that holds another `if` only.
                    branch = body[0].lineno
                else:
                    static = isinstance(node, ast.For) and "static_range" in ast.unparse(node.iter)
                    loops.append((node.lineno, static))
    # `ast.walk` goes from the outside to the inside, so the last branch found is the innermost.
    if branch and loops and branch < loops[-1][0]:
        branch = 0
    return tuple(loops), branch


@cache
def _loops_around(place: Place) -> tuple[Place, ...]:
    """Return the loops of the source around a place, outermost first, without unrolled ones."""
    found = []
    for depth, (name, line) in enumerate(place):
        for loop, static in _nest(name, line)[0]:
            if not static:
                found.append((*place[:depth], (name, loop)))
    return tuple(found)


def _branch_around(place: Place) -> Place | None:
    """Return the innermost branch of the source around a place."""
    for depth in range(len(place) - 1, -1, -1):
        name, line = place[depth]
        branch = _nest(name, line)[1]
        if branch:
            return (*place[:depth], (name, branch))
        if _nest(name, line)[0]:
            return None
    return None


class Trips(NamedTuple):
    """Trips of a loop of the machine code, per program.

    Attributes:
        address: Address of the first instruction.
        source: Loop of the source, or None if it is not known.
        source_trips: Trips of the loop of the source, over all its entries.
        copies: Copies of the body of the source in one trip of the machine code.
        trips: Trips of the loop of the machine code.
    """

    address: int
    source: Place | None
    source_trips: float
    copies: int
    trips: float


class Weights(NamedTuple):
    """How often the parts of a kernel run, per program.

    Attributes:
        blocks: Runs of every block.
        loops: Trips of every loop of the machine code.
        warnings: What could not be connected.
    """

    blocks: dict[int, float]
    loops: list[Trips]
    warnings: list[str]


def weigh(program: Program, counts: Counts) -> Weights:
    """Return how often every block runs, per program."""
    sources = _connect(program, counts)
    own = [_own_instructions(program, n) for n in range(len(program.loops))]
    rows: list[Trips] = []
    warnings: list[str] = []
    for n, source in enumerate(sources):
        address = program.blocks[program.loops[n].header].instructions[0].address
        if source is None:
            warnings.append(f"loop at {address:#x}: no loop of the source, counted once")
            rows.append(Trips(address, None, 1.0, 1, 1.0))
            continue
        same = [m for m, other in enumerate(sources) if other == source]
        smallest = min(same, key=lambda m: len(own[m]))
        copies = {m: _copies(own[m], own[smallest]) for m in same}
        trips = 0.0
        for length, times in counts.entered[source].items():
            # ptxas unrolls a loop and puts the rest of the trips into a smaller one.
            rest = length
            for m in sorted(same, key=lambda m: (-copies[m], m)):
                done, rest = divmod(rest, copies[m])
                trips += done * times if m == n else 0
        total = counts.trips(source)
        rows.append(Trips(address, source, total, copies[n], trips / counts.programs))
    runs = {}
    for b, block in program.blocks.items():
        n = program.innermost(b)
        runs[b] = rows[n].trips if n >= 0 else 1.0
        if not _always(program, b, n):
            branches = Counter(_branch_around(x.place) for x in block.instructions)
            branch = branches.most_common(1)[0][0]
            if branch is not None:
                runs[b] = min(runs[b], counts.branches.get(branch, 0) / counts.programs)
    return Weights(runs, rows, warnings)


def _always(program: Program, block: int, loop: int) -> bool:
    """Return whether every trip of a loop, or every program for -1, passes a block."""
    if loop < 0:
        ends = {n for n, x in program.blocks.items() if not x.following}
    else:
        ends = program.loops[loop].latches
    return any(block in program.dominators[n] for n in ends)


def _own_instructions(program: Program, loop: int) -> list[Instruction]:
    """Return the instructions of a loop that are in none of its inner loops."""
    blocks = sorted(b for b in program.loops[loop].blocks if program.innermost(b) == loop)
    return [x for b in blocks for x in program.blocks[b].instructions]


def _connect(program: Program, counts: Counts) -> list[Place | None]:
    """Return the loop of the source for every loop of the machine code.

    Innermost loops first: the deepest loop of the source that holds most of the instructions. The
    loop of the source around it that holds some of the outer loop's own instructions is the outer
    loop's, and so on. Instructions of an inner loop that were moved out of it therefore do not
    count.
    """
    found: list[Place | None] = [None] * len(program.loops)
    for n in range(len(program.loops) - 1, -1, -1):
        paths = [_loops_around(x.place) for x in _own_instructions(program, n)]
        children = [
            found[m] for m, loop in enumerate(program.loops) if loop.parent == n and found[m]
        ]
        votes: Counter[Place] = Counter()
        for path in paths:
            votes.update(x for x in path if x in counts.entered)
        if children:
            around = [set(_around(child)) for child in children]
            allowed = set.intersection(*around)
            votes = Counter({x: v for x, v in votes.items() if x in allowed})
            # The deepest with instructions that are in no deeper one.
            exact = Counter(path[-1] for path in paths if path and path[-1] in votes)
            chosen = max(exact or votes, key=_depth, default=None)
        else:
            enough = [x for x, v in votes.items() if v >= 0.6 * len(paths)]
            chosen = max(enough, key=_depth, default=None)
        found[n] = chosen
    return found


def _depth(loop: Place) -> int:
    """Return the number of loops around a loop of the source, itself included."""
    return len(_around(loop)) + 1


def _around(loop: Place) -> tuple[Place, ...]:
    """Return the loops of the source around a loop of the source."""
    return tuple(x for x in _loops_around(loop) if x != loop)


def _copies(large: list[Instruction], small: list[Instruction]) -> int:
    """Return how often the body of a small loop is in a large one, by their instructions."""
    few, many = (Counter((x.place, x.opcode) for x in part) for part in (small, large))
    ratios = sorted(many[key] / times for key, times in few.items() if key in many)
    return max(1, round(ratios[len(ratios) // 2])) if ratios else 1
