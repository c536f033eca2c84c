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
from pathlib import Path
from typing import Any, NamedTuple

from scripts.benchmark.kernel_model.launches import pretend_capability
from scripts.benchmark.kernel_model.recipes import RECIPES, Recipe, attention_steps

__all__ = ["Counts", "Place", "count_trips"]

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
    command = [sys.executable, "-m", __spec__.name, recipe.name, str(trips), str(architecture)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = []
    for row in json.loads(run.stdout.splitlines()[-1]):
        entered = {
            _place(key): {int(n): times for n, times in trips.items()}
            for key, trips in row["entered"].items()
        }
        branches = {_place(key): times for key, times in row["branches"].items()}
        found.append(Counts(row["kernel"], row["programs"], entered, branches, row["macs"]))
    return found


def _place(key: str) -> Place:
    """Read a place."""
    return tuple((name, int(line)) for name, _, line in (x.rpartition(":") for x in key.split(">")))


class _Counter:
    """Counts of one launch, and the function that the kernels call."""

    def __init__(self) -> None:
        """Begin without any count."""
        self.trips: dict[str, list[int]] = {}
        self.branches: dict[str, int] = {}
        self.macs = 0
        self.files: set[str] = set()
        # Code of the function that launches a kernel; the frames above it are no kernel's.
        self.launch: Any = None

    def __call__(self, kind: str) -> None:
        """Count one place; the caller's line is its line."""
        lines = []
        frame: Any = sys._getframe(1)
        while frame.f_code is not self.launch:
            if frame.f_code.co_filename in self.files:
                lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            frame = frame.f_back
        key = ">".join(reversed(lines))
        if kind == "enter":
            self.trips.setdefault(key, []).append(0)
        elif kind == "trip":
            self.trips[key][-1] += 1
        else:
            self.branches[key] = self.branches.get(key, 0) + 1

    def clear(self) -> None:
        """Forget all counts."""
        self.trips, self.branches, self.macs = {}, {}, 0

    def report(self, kernel: str, programs: int) -> dict[str, Any]:
        """Return all counts in types of JSON."""
        entered: dict[str, dict[int, int]] = {}
        for key, trips in self.trips.items():
            entered[key] = {n: trips.count(n) for n in sorted(set(trips))}
        macs, branches = self.macs, dict(self.branches)
        row = {"kernel": kernel, "programs": programs, "entered": entered}
        return row | {"branches": branches, "macs": macs}


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


def _main(argv: list[str]) -> None:
    """Count one recipe and print the counts of every launch as JSON."""
    from triton.runtime import interpreter

    recipe = next(recipe for recipe in RECIPES if recipe.name == argv[0])
    wanted, architecture = int(argv[1]), int(argv[2])
    counter = _Counter()
    found: list[dict[str, Any]] = []

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

    run_rewriter = interpreter.FunctionRewriter.rewrite_ast

    def rewrite(self: Any) -> Any:
        function = run_rewriter(self)
        counter.files.add(self.filename)
        return function

    builder = interpreter.interpreter_builder
    set_idx, set_dim, dot = builder.set_grid_idx, builder.set_grid_dim, builder.create_dot
    run_all = interpreter.InterpretedFunction.run
    sample: list[int] = []
    sizes: list[int] = []

    def set_sampled(x: int, y: int, z: int) -> None:
        program = sample[x]
        set_idx(program % sizes[0], program // sizes[0] % sizes[1], program // sizes[0] // sizes[1])

    def count_dot(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        counter.macs += a.data.size * b.data.shape[-1]
        return dot(a, b, *args, **kwargs)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        grid = (
            grid(dict(zip(self.arg_names, args, strict=False)) | kwargs) if callable(grid) else grid
        )
        sizes[:] = [*map(int, grid), 1, 1][:3]
        total = sizes[0] * sizes[1] * sizes[2]
        # The trips of one program decide how many programs run.
        number = 1
        for _ in range(2):
            sample[:] = spread(total, number)
            counter.clear()
            run_all(self, *args, grid=(len(sample),), warmup=warmup, **kwargs)
            trips = sum(map(sum, counter.trips.values()))
            number = min(total, 60, max(4, wanted // max(1, trips)))
        found.append(counter.report(self.fn.__name__, len(sample)))

    counter.launch = run.__code__
    setattr(interpreter, _COUNTER, counter)
    interpreter.FunctionRewriter.ast_transformer = Transformer()
    interpreter.FunctionRewriter.rewrite_ast = rewrite
    builder.set_grid_idx, builder.create_dot = set_sampled, count_dot
    builder.set_grid_dim = lambda *_: set_dim(*sizes)
    interpreter.InterpretedFunction.run = run
    with pretend_capability(architecture):
        for step in attention_steps(recipe, "cpu").values():
            step()
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1:])
