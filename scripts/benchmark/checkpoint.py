"""Measure checkpoints and the start of a training.

    python -m scripts.benchmark checkpoint --output benchmarks/checkpoint.json

Writing and reading are compared with plain `torch.save` and `torch.load(weights_only=True)`, which
neither sync the file to the disk nor check it. The rounds alternate, and medians are printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import classification.models  # noqa: F401  (registers the published models)
from engine.checkpoint import CheckpointDir
from engine.provenance import machine
from irpe_core import load_checkpoint
from scripts.benchmark.timing import positive_int

__all__ = ["main", "measure", "parse_args"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the medians, and write them to `--output` as JSON."""
    args = parse_args(argv)
    results, size = measure(args.model, args.rounds)
    print(f"checkpoint of {size:.0f} MB")
    for name, seconds in results.items():
        print(f"{name:<40} {seconds:7.3f} s")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(), "rounds": args.rounds, "model": args.model}
        report |= {"checkpoint_mb": round(size, 1), "results": results}
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark checkpoint", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    model = "deit_small_patch16_224_ctx_product_50_shared_k"
    parser.add_argument("--model", default=model, help="name of a model of timm (default: DeiT-S)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="rounds (default: 5)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def measure(model: str, rounds: int) -> tuple[dict[str, float], float]:
    """Return the median seconds of each part, and the size of the checkpoint in MB.

    Args:
        model: Name of a model of timm. Its checkpoint has the state of AdamW too.
        rounds: Number of measurements of each part.
    """
    state = _state(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, data = folder / "plain.pth", folder / "digits"
        checkpoints = CheckpointDir(folder)
        path = checkpoints.save(state)
        parts: dict[str, Callable[[], object]] = {
            "torch.save": lambda: torch.save(state, plain),
            "write a checkpoint": lambda: checkpoints.save(state),
            "torch.load": lambda: torch.load(plain, weights_only=True),
            "read and check a checkpoint": lambda: load_checkpoint(path),
            "classification.main --help": lambda: _run("--help"),
            "classification.main, one step of digits": lambda: _run(*_one_step(data)),
        }
        for part in parts.values():
            part()
        times: dict[str, list[float]] = {part: [] for part in parts}
        for _ in range(rounds):
            for part, work in parts.items():
                start = time.perf_counter()
                work()
                times[part].append(time.perf_counter() - start)
        size = path.stat().st_size
    return {part: round(statistics.median(of), 4) for part, of in times.items()}, size / 1e6


def _state(name: str) -> dict[str, Any]:
    """Return weights and the state of AdamW after one step."""
    model = timm.create_model(name)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _one_step(data: Path) -> list[str]:
    """Return the flags of a training of one step, with an evaluation, that saves nothing."""
    config = "configs/classification/digits.yaml"
    flags = ["--config", config, "--data_path", str(data), "--device", "cpu", "--logger", "none"]
    return [*flags, "--epochs", "1", "--max_steps", "1"]


def _run(*flags: str) -> None:
    """Run the classification trainer in a process of its own."""
    command = [sys.executable, "-m", "classification.main", *flags]
    subprocess.run(command, check=True, capture_output=True)
