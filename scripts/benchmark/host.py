"""Measure the host time of an attention layer with iRPE on a GPU, on a machine without one.

    OMP_NUM_THREADS=1 python -m scripts.benchmark host --output benchmarks/host.json

On a GPU the host only launches kernels. A layer is slow on small batches if the host takes longer
than the kernels. This benchmark runs `RPEAttention` on the CPU with tiny tensors and compares it
with timm's attention. The launch of Triton's kernels is replaced by a function that does nothing.
So the times contain the Python code of the layer, of irpe_core and of rpe_ops, and the small torch
operators that they call. They do not contain Triton's own launch, which needs a GPU.

Each round measures all layers in turn and takes medians over the calls. The smallest median of the
rounds counts, because other programs on the machine can only make a call slower.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from timm.layers import Attention
from torch import Tensor, nn

from engine.provenance import machine
from irpe_core import RPEAttention, parse_rpe_spec, set_implementation
from rpe_ops import implementations
from scripts.benchmark.timing import positive_int

__all__ = ["main", "measure", "parse_args"]

SPECS = ("rpe-1.9-product-ctx-1-k", "rpe-1.9-product-ctx-1-qk", "rpe-1.9-product-ctx-1-qkv")
GRID, DIM, HEADS = (2, 2), 32, 2


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--calls",
        type=positive_int,
        default=500,
        help="Number of timed calls per round (default: 500)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help="Number of rounds (default: 5)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the host times and the difference to a layer without iRPE."""
    args = parse_args(argv)
    times = measure(args.calls, args.rounds)
    print(_table(times))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(), "calls": args.calls, "rounds": args.rounds}
        report["microseconds"] = times
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def measure(calls: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the smallest of the rounds' median times in microseconds, by layer and pass."""
    with _launches_replaced():
        layers: dict[str, nn.Module] = {"timm": Attention(DIM, HEADS, qkv_bias=True)}
        for spec in SPECS:
            layers[spec] = RPEAttention(DIM, HEADS, parse_rpe_spec(spec, skip=1), GRID)
            set_implementation(layers[spec], "triton", "cpu")
        results = [
            {name: _time_layer(layer, calls) for name, layer in layers.items()}
            for _ in range(rounds)
        ]
    return {
        name: {kind: min(result[name][kind] for result in results) for kind in passes}
        for name, passes in results[0].items()
    }


def _do_not_launch(*args: object, **kwargs: object) -> None:
    """Do nothing instead of a launch. A mock would record its arguments, which takes time."""


@contextmanager
def _launches_replaced() -> Iterator[None]:
    """Let Triton's kernels run on the CPU as launches that do nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("error: TRITON_INTERPRET must not be 1: it replaces the launches, too")
    from triton.runtime.jit import JITFunction

    known = implementations._reason_against

    def reason_against(name: str, device_type: str, operator: str) -> str:
        return "" if name == "triton" else known(name, device_type, operator)

    with (
        mock.patch.object(implementations, "_reason_against", reason_against),
        mock.patch.object(JITFunction, "run", _do_not_launch),
    ):
        yield


def _time_layer(layer: nn.Module, calls: int) -> dict[str, float]:
    """Return the median times of the forward pass, for evaluation and training, and of a step."""
    x = torch.randn(1, 1 + GRID[0] * GRID[1], DIM, requires_grad=True)
    grad = torch.randn(x.shape)

    @torch.inference_mode()
    def evaluate() -> Tensor:
        return layer(x)

    def step() -> None:
        layer(x).backward(grad)

    passes = {"evaluation": evaluate, "forward": lambda: layer(x), "forward and backward": step}
    return {name: _median_us(function, calls) for name, function in passes.items()}


def _median_us(function: Callable[[], object], calls: int) -> float:
    """Return the median time of a call in microseconds, after a warm-up."""
    for _ in range(max(3, calls // 10)):
        function()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(times), 1)


def _table(times: dict[str, dict[str, float]]) -> str:
    """Format the times, with the difference to the layer without iRPE in parentheses."""
    base = times["timm"]
    lines = [f"| layer | {' | '.join(base)} |", "|---" * (1 + len(base)) + "|"]
    for name, passes in times.items():
        cells = [f"{us:.0f} µs ({us - base[kind]:+.0f})" for kind, us in passes.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
