"""Count how often the loops and branches of Triton kernels run, in Triton's interpreter.

    TRITON_INTERPRET=1 python -m scripts.benchmark.kernel_model.trip_counts RECIPE TRIPS ARCH

The kernels are Python code in the interpreter. A counter is put into the body of every loop and
branch, and some programs of every launch run, spread evenly over its grid. The sizes are those of
the recipe, so the counts need no formula and no name of a kernel. A place is named by its lines:
the line of the loop, after the lines of the calls that lead to it. The compiler writes the same
lines into the debug information of a kernel, which connects the loops of the machine code with the
counts (`sass`). The multiplications of `tl.dot` are counted too, to check the result.
"""

import ast
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from scripts.benchmark.kernel_model.launches import pretend_capability
from scripts.benchmark.kernel_model.recipes import RECIPES, Recipe, attention_steps

__all__ = ["Counts", "Place", "count_trips", "counting", "spread"]

ROOT = Path(__file__).parents[3]
_COUNTER = "_count_trips_of_this_place"

# File and line of the calls that lead to a place, outermost first, and of the place itself.
Place = tuple[tuple[str, int], ...]


class Counts(NamedTuple):
    """How often the places of a launch run, per program, on average over the counted programs.

    Attributes:
        kernel: Name of the function of the kernel.
        programs: Programs counted.
        entered: For every loop, how often it runs each number of trips, over all programs.
        branches: For every branch of an `if`, how often it runs, over all programs; a place is
            the line of the first statement in the branch.
        macs: Multiplications of all `tl.dot`, over all programs.
    """

    kernel: str
    programs: int
    entered: dict[Place, dict[int, int]]
    branches: dict[Place, int]
    macs: int

    def trips(self, place: Place) -> float:
        """Return the trips of a loop per program, over all its entries."""
        return sum(n * times for n, times in self.entered[place].items()) / self.programs


def count_trips(recipe: Recipe, trips: int, architecture: int) -> list[Counts]:
    """Return the counts of every launch of a recipe.

    They are counted in a process of its own, because Triton chooses the interpreter when it is
    imported.

    Args:
        recipe: Recipe.
        trips: About how many trips to count per launch, which decides how many programs run.
        architecture: 80 or 90, the architecture that the launchers find.

    Raises:
        subprocess.CalledProcessError: A kernel fails in the interpreter.
    """
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name]
    command += [recipe.name, str(trips), str(architecture)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    rows = json.loads(run.stdout.splitlines()[-1])
    for row in rows:
        row["entered"] = {
            _place(place): {int(n): times for n, times in lengths.items()}
            for place, lengths in row["entered"]
        }
        row["branches"] = {_place(place): times for place, times in row["branches"]}
    return [Counts(**row) for row in rows]


def _place(lines: list[list]) -> Place:
    """Return a place that was read from JSON."""
    return tuple((name, line) for name, line in lines)


class _Counter:
    """Counts of one launch, and the function that the kernels call."""

    def __init__(self) -> None:
        """Begin without any count."""
        self.files: set[str] = set()
        # Code of the function that launches a kernel; the frames above it are no kernel's.
        self.launch: Any = None
        self.clear()

    def __call__(self, kind: str) -> None:
        """Count one place; the caller's line is its line."""
        lines = []
        frame: Any = sys._getframe(1)
        while frame.f_code is not self.launch:
            if frame.f_code.co_filename in self.files:
                lines.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        place = tuple(reversed(lines))
        if kind == "enter":
            self.lengths.setdefault(place, []).append(0)
        elif kind == "trip":
            self.lengths[place][-1] += 1
        else:
            self.branches[place] += 1

    def clear(self) -> None:
        """Forget all counts."""
        # For every loop, the trips of each time it was entered.
        self.lengths: dict[Place, list[int]] = {}
        self.branches: Counter[Place] = Counter()
        self.macs = 0

    def report(self, kernel: str, programs: int) -> Counts:
        """Return all counts."""
        entered = {place: dict(Counter(lengths)) for place, lengths in self.lengths.items()}
        return Counts(kernel, programs, entered, dict(self.branches), self.macs)


def _call(kind: str, line: int) -> ast.Expr:
    """Return the statement that counts a place."""
    call = ast.Call(ast.Name(_COUNTER, ast.Load()), [ast.Constant(kind)], [])
    statement = ast.Expr(call)
    for node in ast.walk(statement):
        node.lineno = node.end_lineno = line
        node.col_offset = node.end_col_offset = 0
    return statement


def spread(total: int, number: int) -> list[int]:
    """Return numbers below `total` at a constant distance, modulo `total`.

    The distance has no divisor in common with `total`. So if a grid has m kinds of programs, which
    alternate, every kind appears equally often among m programs, or a multiple of m.
    """
    distance = round(total * 0.618)
    while math.gcd(distance, total) > 1:
        distance += 1
    return [n * distance % total for n in range(number)]


@contextmanager
def counting(trips: int) -> Iterator[list[Counts]]:
    """Count the launches of kernels in the interpreter, and run only some programs of each.

    Kernels that have run in the interpreter before cannot be counted.

    Args:
        trips: About how many trips to count per launch, which decides how many programs run.

    Yields:
        Counts of every launch so far, in order.
    """
    from triton.runtime import interpreter

    counter = _Counter()
    found: list[Counts] = []
    builder = interpreter.interpreter_builder
    function, rewriter = interpreter.InterpretedFunction, interpreter.FunctionRewriter
    run_launch, rewrite_source = function.run, rewriter.rewrite_ast
    set_idx, set_dim, dot = builder.set_grid_idx, builder.set_grid_dim, builder.create_dot
    sizes: list[int] = []
    sample: list[int] = []

    class Transformer(interpreter.ASTTransformer):
        """The interpreter's own changes, and a counter in every loop and branch."""

        def visit(self, node: ast.AST) -> Any:
            """Change a node and its children."""
            node = super().visit(node)
            if isinstance(node, ast.For | ast.While):
                node.body.insert(0, _call("trip", node.lineno))
                return [_call("enter", node.lineno), node]
            if isinstance(node, ast.If):
                for branch in filter(None, (node.body, node.orelse)):
                    branch.insert(0, _call("branch", branch[0].lineno))
            return node

    def rewrite(self: Any) -> Any:
        rewritten = rewrite_source(self)
        counter.files.add(self.filename)
        return rewritten

    def set_sampled(x: int, y: int, z: int) -> None:
        program = sample[x]
        set_idx(program % sizes[0], program // sizes[0] % sizes[1], program // sizes[0] // sizes[1])

    def set_all(*_: int) -> None:
        set_dim(*sizes)

    def count_dot(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        counter.macs += a.data.size * b.data.shape[-1]
        return dot(a, b, *args, **kwargs)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        sizes[:] = [*map(int, grid), 1, 1][:3]
        total = sizes[0] * sizes[1] * sizes[2]
        # The trips of one program decide how many programs run.
        number = 1
        for _ in range(2):
            sample[:] = spread(total, number)
            counter.clear()
            run_launch(self, *args, grid=(number,), warmup=warmup, **kwargs)
            counted = counter.report(self.fn.__name__, number)
            per_program = max(1, round(sum(map(counted.trips, counted.entered)) / number))
            number = min(total, 60, max(4, trips // per_program))
        found.append(counted)

    counter.launch = run.__code__
    with (
        mock.patch.object(interpreter, _COUNTER, counter, create=True),
        mock.patch.object(rewriter, "ast_transformer", Transformer()),
        mock.patch.object(rewriter, "rewrite_ast", rewrite),
        mock.patch.object(function, "run", run),
        mock.patch.object(builder, "set_grid_idx", set_sampled),
        mock.patch.object(builder, "set_grid_dim", set_all),
        mock.patch.object(builder, "create_dot", count_dot),
    ):
        yield found


def _main(argv: list[str]) -> None:
    """Count one recipe and print the counts of every launch as JSON."""
    name, trips, architecture = argv
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    with pretend_capability(int(architecture)), counting(int(trips)) as found:
        for step in attention_steps(recipe, "cpu").values():
            step()
    # A place is no key of JSON.
    rows = [
        counts._replace(entered=[*counts.entered.items()], branches=[*counts.branches.items()])
        for counts in found
    ]
    print(json.dumps([row._asdict() for row in rows]))


if __name__ == "__main__":
    _main(sys.argv[1:])
