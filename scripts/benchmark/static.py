"""Estimate the time of the Triton attention kernels from their machine code, without a GPU.

    python -m scripts.benchmark static --output benchmarks/static.json
    python -m scripts.benchmark static --quick --recipe "DeiT-S/B k" --kernel backward

This is a model, not a measurement. It compares designs of a kernel. It does not predict times.

Kernels are found by recording the launches of `rpe_ops.triton_kernels` on meta tensors, at the
sizes of the recipes and in bfloat16. They are compiled for sm_80 and sm_90 and disassembled. Loops
in the control flow are connected with the loops of the source by debug information, and those are
counted in Triton's interpreter, so the trip counts are those of the recipe's grid. Some programs of
every launch are counted. `MMA/dot` checks the result: the multiplications of tensor cores in the
machine code, times the trips, over those of `tl.dot` in the interpreter. It is 1 if the trips of
all loops with products are right and no product is computed twice.

Instructions per pair are those of all threads, over the B·H·L² pairs of a query and a key. Masked
parts of a tile count, so a tile that hangs over the edge costs more per pair. Bounds:

    issue      instructions of warps, one per clock on each of the 4 schedulers of an SM
    unit       the same for the unit that is busiest, such as FMA, ALU or tensor cores
    latency    one program alone, whose instructions wait for their operands, times the waves of
               programs that an SM holds at a time (`kernel_model.latency`)
    memory     all tensors of the launch, each moved once, at the full bandwidth

`MB moved` is all tensors once, and `reuse` is how often the instructions read and write them.

Assumptions: boost clock and full bandwidth of the memory; the SM with most programs decides, in
whole waves; no bank conflicts in shared memory; loads hit the L2 cache; in L1, a load takes as long
as its bytes, as if they were adjacent, although a load of lookups from many rows takes longer; a
block that some trips skip runs as often as the branch of the source it belongs to. Not modeled:
the time of a launch, misses of caches, lower clocks under load.

A kernel takes at least the largest of issue, unit and memory. If the latency is larger, too few
warps are resident to hide it. Torch's operators around the kernels are counted by the bytes of
their inputs and outputs, and by their products at the peak of the tensor cores.
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

# Programs of a launch are counted until their loops have run so many trips together.
TRIPS, QUICK_TRIPS = 8000, 1000


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        nargs="+",
        metavar="TEXT",
        help="Texts in the names of recipes (default: those of published configurations)",
    )
    parser.add_argument(
        "--kernel", nargs="+", metavar="TEXT", help="Texts in the names of kernels (default: all)"
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        type=int,
        choices=(80, 90),
        default=[80, 90],
        help="Architectures: 80 for the A100, 90 for the H100 (default: both)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="Fewer programs for counting the trips of loops"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file to write (default: none)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile all kernels, print their bounds as Markdown, and write JSON."""
    args = parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET must not be 1, because its kernels are not compiled")
    # Triton decides when it is imported whether kernels are compiled.
    from scripts.benchmark.kernel_model.recipes import MODELED, RECIPES

    recipes = MODELED
    if args.recipe:
        found = [recipe for recipe in RECIPES if _matches(recipe.name, args.recipe)]
        recipes = [recipe for recipe in found if recipe.dtype == torch.bfloat16]
    if not recipes:
        sys.exit(f"error: --recipe must be in the name of a recipe, got {' '.join(args.recipe)}")
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        rows += estimate_recipe(recipe, args)
    if not any("registers" in row for row in rows):
        sys.exit(f"error: --kernel must be in the name of a kernel, got {' '.join(args.kernel)}")
    layers = sum_layers(rows)
    print_loops(rows)
    print_layers(layers)
    if args.output:
        write(args.output, rows, layers)


def estimate_recipe(recipe: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the estimates of all kernels of a recipe, and print each as a row of a table."""
    from scripts.benchmark.kernel_model.bounds import estimate, estimate_torch
    from scripts.benchmark.kernel_model.gpus import GPUS
    from scripts.benchmark.kernel_model.launches import (
        name_launches,
        pretend_capability,
        record_launches,
    )
    from scripts.benchmark.kernel_model.recipes import attention_steps
    from scripts.benchmark.kernel_model.trip_counts import count_trips

    counted: dict[str, Any] = {}
    rows = []
    print_header(recipe.name)
    for architecture in args.arch:
        gpu = GPUS[architecture]
        with pretend_capability(architecture):
            recorded = {
                step: record_launches(call)
                for step, call in attention_steps(recipe, "meta").items()
            }
        launches = [launch for found, _ in recorded.values() for launch in found]
        key = repr([(x.kernel.fn.__name__, x.grid, x.constants) for x in launches])
        if key not in counted:
            trips = QUICK_TRIPS if args.quick else TRIPS
            counted[key] = count_trips(recipe, trips, architecture)
        named = zip(name_launches(launches), counted[key], strict=True)
        for step, (found, work) in recorded.items():
            for launch in found:
                name, counts = next(named)
                assert counts.kernel == launch.kernel.fn.__name__
                if _matches(name, args.kernel):
                    row = {"recipe": recipe.name, "gpu": gpu.name, "step": step, "kernel": name}
                    rows.append(row | estimate(launch, counts, gpu, recipe.pairs))
                    print_row(rows[-1])
            if args.kernel is None:
                row = {"recipe": recipe.name, "gpu": gpu.name, "step": step, "kernel": "torch"}
                rows.append(row | estimate_torch(work, gpu))
    return rows


def _matches(name: str, texts: list[str] | None) -> bool:
    """Return whether a name contains one of some texts, or there are none."""
    return texts is None or any(text in name for text in texts)


def sum_layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sums over the kernels of every recipe, GPU and step, in microseconds."""
    layers: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = {name: row[name] for name in ("recipe", "gpu", "step")}
        empty = key | {"issue": 0.0, "low": 0.0, "high": 0.0, "torch": 0.0}
        layer = layers.setdefault(tuple(key.values()), empty)
        times = row["microseconds"]
        if row["kernel"] == "torch":
            layer["torch"] += max(times.values())
            continue
        layer["issue"] += times["issue"]
        layer["low"] += max(times["issue"], times["unit"], times["memory"])
        layer["high"] += max(times.values())
    return [
        {key: round(x, 1) if isinstance(x, float) else x for key, x in layer.items()}
        for layer in layers.values()
    ]


def print_header(recipe: str) -> None:
    """Print the head of the table of a recipe."""
    from scripts.benchmark.kernel_model.opcodes import KINDS

    print(f"\n{recipe}: instructions per pair, resources, and bounds of the model in µs\n")
    columns = ["GPU", "kernel", *KINDS, "all", "registers", "spills", "shared memory"]
    columns += ["programs and warps per SM", "issue", "unit", "latency", "memory"]
    columns += ["MB moved, reuse", "MMA/dot"]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns), flush=True)


def print_row(row: dict[str, Any]) -> None:
    """Print a kernel as a row of a table, and its warnings."""
    times = row["microseconds"]
    cells = [row["gpu"], row["kernel"], *(f"{n:.1f}" for n in row["per_pair"].values())]
    cells += [f"{row['instructions_per_pair']:.1f}", row["registers"], row["spill_instructions"]]
    cells += [row["shared_bytes"], f"{row['programs_per_sm']}, {row['warps_per_sm']}"]
    cells += [f"{times['issue']:.0f}", f"{times['unit']:.0f} {row['busiest_unit']}"]
    cells += [f"{times['latency']:.0f}", f"{times['memory']:.0f}"]
    reuse = row["requested_bytes"] / row["memory_bytes"]
    cells += [f"{row['memory_bytes'] / 1e6:.0f}, {reuse:.1f}", row["mma_over_dot"]]
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    for warning in row["warnings"]:
        print(f"warning: {row['kernel']}, {row['gpu']}: {warning}", file=sys.stderr)


def print_loops(rows: list[dict[str, Any]]) -> None:
    """Print which loop of the source every loop of the machine code is, and its trips."""
    print("\nTrips of the loops, per program on average\n")
    print("| recipe | GPU | kernel | address | loop of the source | trips | copies of its body |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        for loop in row.get("loops", []):
            cells = [row["recipe"], row["gpu"], row["kernel"], loop["address"]]
            cells += [f"`{loop['code']}`, {loop['source']}", loop["trips"], loop["copies_of_body"]]
            print("|", " | ".join(map(str, cells)), "|")


def print_layers(layers: list[dict[str, Any]]) -> None:
    """Print the sums over the kernels of a layer."""
    print("\nWhole layer, sums over the kernels in µs: a model, not a measurement\n")
    print("| recipe | GPU | step | issue | at least | with latency | torch's operators |")
    print("|---|---|---|---|---|---|---|")
    for layer in layers:
        print("|", " | ".join(map(str, layer.values())), "|")


def write(path: Path, rows: list[dict[str, Any]], layers: list[dict[str, Any]]) -> None:
    """Write all estimates, with the model's GPUs and the versions of the compiler."""
    import triton

    from scripts.benchmark.kernel_model.gpus import GPUS

    report = {
        "note": ["estimates of a model, not measurements: scripts/benchmark/static.py"],
        "versions": [{"torch": torch.__version__, "triton": triton.__version__}],
        "gpus": [gpu._asdict() for gpu in GPUS.values()],
        "layers_us": layers,
        "kernels": rows,
    }
    # One line for every item, which is small and can be compared with `git diff`.
    parts = [
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, items)) + "\n]"
        for name, items in report.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
