"""Estimate the time of the Triton attention kernels from their machine code, without a GPU.

    python -m scripts.benchmark static --output benchmarks/static.json
    python -m scripts.benchmark static --quick --recipe "DeiT-S/B k" --kernel backward

This is a model, not a measurement. It compares designs of kernels; it does not predict times.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["main"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe", nargs="+", metavar="TEXT", help="Recipes whose name contains a text"
    )
    parser.add_argument(
        "--kernel", nargs="+", metavar="TEXT", help="Kernels whose name contains a text"
    )
    parser.add_argument(
        "--arch", nargs="+", type=int, choices=(80, 90), default=[80, 90], help="Architectures"
    )
    parser.add_argument("--quick", action="store_true", help="Count the loops of fewer programs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile all kernels, print their bounds as a table, and write JSON."""
    args = parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: the environment variable TRITON_INTERPRET must not be 1")
    from scripts.benchmark.kernel_model.bounds import estimate
    from scripts.benchmark.kernel_model.gpus import GPUS
    from scripts.benchmark.kernel_model.launches import (
        name_launches,
        pretend_capability,
        record_launches,
    )
    from scripts.benchmark.kernel_model.recipes import RECIPES, attention_step
    from scripts.benchmark.kernel_model.trip_counts import count_trips

    rows: list[dict[str, Any]] = []
    print_header()
    for recipe in RECIPES:
        if recipe.dtype != torch.bfloat16 or not _matches(recipe.name, args.recipe):
            continue
        counted: dict[str, Any] = {}
        for architecture in args.arch:
            with pretend_capability(architecture):
                launches = record_launches(lambda recipe=recipe: attention_step(recipe, "meta"))
            key = repr([(x.kernel.fn.__name__, x.grid, x.constants) for x in launches])
            if key not in counted:
                counted[key] = count_trips(recipe, 6 if args.quick else 30, architecture)
            counts = counted[key]
            assert [x.kernel for x in counts] == [x.kernel.fn.__name__ for x in launches]
            for name, launch, count in zip(name_launches(launches), launches, counts, strict=True):
                if _matches(name, args.kernel):
                    row = {"recipe": recipe.name, "kernel": name, "gpu": GPUS[architecture].name}
                    row |= estimate(launch, count, architecture, recipe.pairs)
                    rows.append(row)
                    print_row(row)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"results": rows}, indent=1) + "\n")


def _matches(name: str, texts: list[str] | None) -> bool:
    """Return whether a name contains one of some texts, or there are none."""
    return texts is None or any(text in name for text in texts)


def print_header() -> None:
    """Print the head of the table."""
    from scripts.benchmark.kernel_model.sass import KINDS

    columns = ["recipe", "kernel", "GPU", *KINDS, "all", "registers", "shared", "warps/SM"]
    columns += ["spills", "issue µs", "unit µs", "latency µs", "memory µs", "MMA/dot"]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))


def print_row(row: dict[str, Any]) -> None:
    """Print a kernel as a row of the table."""
    times = row["microseconds"]
    cells = [row["recipe"], row["kernel"], row["gpu"]]
    cells += [f"{n:.1f}" for n in row["per_pair"].values()]
    cells += [row["instructions_per_pair"], row["registers"], row["shared_bytes"]]
    cells += [row["warps_per_sm"], row["spill_instructions"], f"{times['issue']:.0f}"]
    cells += [f"{times['unit']:.0f} ({row['busiest_unit']})", f"{times['latency']:.0f}"]
    cells += [f"{times['memory']:.0f}", row["mma_over_dot"]]
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    for warning in row["warnings"]:
        print(f"warning: {row['kernel']}, {row['gpu']}: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
