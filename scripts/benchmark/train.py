r"""Time a training step and an evaluation with iRPE against the same model without it.

    OMP_NUM_THREADS=2 python -m scripts.benchmark train --output benchmarks/train_cpu.json
    OMP_NUM_THREADS=2 python -m scripts.benchmark train --recipe detr --batch-size 1 \
        --output benchmarks/train_detr_cpu.json
    python -m scripts.benchmark train --recipe detr --batch-size 2 --profile

DeiT gets images of 224 x 224, and its baseline is the model of timm. DETR with ResNet-50 gets
images of 608 x 800 with ten objects each. The models run alternately in one process, so that
another load on the machine slows down all of them. A ratio is the median over the rounds of (time
with iRPE / time without iRPE in the same round).

`--profile` measures no times. It counts the operators that the host launches in a step of the
trainer, and how often the host waits for the device. Both can be counted without a GPU.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import timm
import torch
from torch import nn

import rpe_ops
from irpe_core import add_irpe, set_implementation
from scripts.benchmark.timing import clock, median_ratio, positive_int

__all__ = ["main"]

VARIANTS = ("ctx_product_50_shared_k", "ctx_product_50_shared_qk", "ctx_product_50_shared_qkv")
SPECS = ("", "rpe-2.0-product-ctx-1-k", "rpe-2.0-product-ctx-1-qkv")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        choices=("deit", "detr"),
        default="deit",
        help="Model family: DeiT or DETR (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        choices=("tiny", "small", "base"),
        default="small",
        help="Size of DeiT (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="Number of images per step (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=7,
        metavar="N",
        help="Number of timed rounds, after two warm-up rounds (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device, such as cpu or cuda:0 (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Data type of automatic mixed precision (default: %(default)s)",
    )
    parser.add_argument(
        "--implementation",
        choices=("auto", *rpe_ops.IMPLEMENTATIONS),
        default="auto",
        help="Implementation of the iRPE operators (default: %(default)s)",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="Count operators and host syncs per training step instead of measuring times",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file to write (default: none)"
    )
    return parser.parse_args(argv)


class Classifier(nn.Module):
    """A model of timm that returns its loss in training.

    Args:
        name: Name of the model in timm.
        spec: Spec of the encodings to add; empty for none.
        options: Options of the model.
    """

    def __init__(self, name: str, spec: str = "", **options) -> None:
        super().__init__()
        self.model = timm.create_model(name, **options)
        if spec:
            add_irpe(self.model, spec)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.model(images)
        if not self.training:
            return logits
        targets = torch.arange(len(images), device=images.device)
        return nn.functional.cross_entropy(logits.float(), targets)


class Detector(nn.Module):
    """A DETR of the published recipe that returns its loss in training."""

    def __init__(self, spec: str) -> None:
        from detection.build import build_model
        from detection.config import parse_args as detection_config

        super().__init__()
        config = detection_config(["--enc_rpe2d", spec, "--backbone_weights", "none"])
        self.model, self.criterion, _ = build_model(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = self.model(images)
        if not self.training:
            return outputs["pred_logits"]
        objects = {
            "labels": torch.arange(1, 11, device=images.device),
            "boxes": torch.linspace(0.2, 0.5, 40, device=images.device).view(10, 4),
        }
        losses = self.criterion(outputs, [objects] * len(images))
        return sum(losses[name] * weight for name, weight in self.criterion.weight_dict.items())


def train_step(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that does one step: forward, backward, AdamW, scaled in float16."""
    device = images.device.type
    trained = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(images)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def evaluation(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that does one forward pass without gradients."""

    @torch.inference_mode()
    def run() -> None:
        model.eval()
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            model(images)

    return run


def measure(
    tasks: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every task in every round. The order of tasks rotates."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for number in range(rounds + 2):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = clock(device)
            tasks[name]()
            if number >= 2:
                times[name].append(clock(device) - start)
    return times


def profile(args: argparse.Namespace, device: torch.device) -> None:
    """Print and write the numbers of operators and host syncs of a training step."""
    from engine.provenance import machine
    from scripts.benchmark.host_syncs import profile_step

    if args.recipe == "deit" and args.batch_size % 2:
        raise SystemExit(f"error: --batch-size must be even for mixup, got {args.batch_size}")
    work = profile_step(args.recipe, args.size, args.batch_size, device)
    print(f"training step: {work.operators:,} operators, {work.syncs} host sync(s)")
    if args.output:
        report = {"machine": machine(device), "recipe": args.recipe, "batch_size": args.batch_size}
        _write(report | asdict(work), args.output)


def _write(report: dict, path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and write JSON."""
    # The GPU benchmark uses the rest of this module without pydantic, which these need.
    import classification.models  # noqa: F401  (registers the models)
    from engine.provenance import machine

    args = parse_args(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    if args.profile:
        profile(args, device)
        return
    if args.recipe == "deit":
        shape = (224, 224)
        base = f"deit_{args.size}_patch16_224"
        names = [base, *(n for n in (f"{base}_{v}" for v in VARIANTS) if timm.is_model(n))]
        models = {name: Classifier(name).to(device) for name in names}
    else:
        shape = (608, 800)
        models = {f"detr_r50 {spec}".strip(): Detector(spec).to(device) for spec in SPECS}
    base, *with_rpe = models
    try:
        operators = [
            set_implementation(models[name], args.implementation, device) for name in with_rpe
        ]
    except rpe_ops.ImplementationError as error:
        raise SystemExit(f"error: {error}") from error
    images = torch.randn(args.batch_size, 3, *shape, device=device)

    results = {}
    for kind, make in (("train step", train_step), ("evaluation", evaluation)):
        tasks = {name: make(model, images, dtype) for name, model in models.items()}
        times = measure(tasks, args.rounds, device)
        results[kind] = {
            name: {
                "median_seconds": statistics.median(seconds),
                "ratio": median_ratio(seconds, times[base]),
            }
            for name, seconds in times.items()
        }
    report = {
        "machine": machine(device),
        "operators": operators[0],
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "results": results,
    }
    for kind, rows in results.items():
        print(f"\n{kind:<52} {'ms':>9} {'ratio':>7}")
        for name, row in rows.items():
            print(f"{name:<52} {1e3 * row['median_seconds']:>9.1f} {row['ratio']:>7.3f}")
    if args.output:
        _write(report, args.output)
