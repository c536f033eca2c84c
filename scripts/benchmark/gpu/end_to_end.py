"""Section `end_to_end`: NCCL, gradient scaling, and two small trainings to their gates.

The gates are those of the quickstart: `scripts.quickstart.classification` and
`scripts.quickstart.detection`.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from irpe_core import RPEAttention, RPEConfig
from scripts.benchmark.gpu.client import ROOT
from scripts.benchmark.gpu.comparison import close
from scripts.benchmark.gpu.setup import Check, Setup, require, require_packages

__all__ = ["checks"]

# The trainers of classification and detection need these.
_TRAINER_NEEDS = (
    *("pydantic", "yaml", "torchvision", "timm", "tqdm", "sklearn", "PIL"),
    *("pycocotools", "scipy", "matplotlib"),
)
_SHOWN_LINES = 3


def checks(setup: Setup) -> dict[str, Check]:
    """Return the checks of this section by name."""
    return {
        "scenes": partial(_scenes, setup),
        "digits": partial(_digits, setup),
        "one process of NCCL": partial(_distributed, setup),
        "GradScaler in float16": partial(_scaler, setup),
    }


def _network(setup: Setup) -> nn.Module:
    """Return an attention with iRPE and a linear layer."""
    config = RPEConfig(ratio=1.9, method="product", skip=1, rpe_on="qkv")
    return nn.Sequential(RPEAttention(48, 3, config, (3, 4)), nn.Linear(48, 5)).to(setup.device)


def _distributed(setup: Setup) -> dict:
    """Compare gradients of DistributedDataParallel in one process with those without it."""
    from torch import distributed

    backend = "nccl" if setup.on_gpu else "gloo"
    network = _network(setup)
    x = torch.randn(2, 13, 48, device=setup.device)
    expected = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            total = torch.ones(3, device=setup.device)
            distributed.all_reduce(total)
            assert total.tolist() == [1.0, 1.0, 1.0], f"all_reduce returned {total.tolist()}"
            ids = [0] if setup.on_gpu else None
            wrapped = nn.parallel.DistributedDataParallel(network, device_ids=ids)
            wrapped(x).square().sum().backward()
            actual = [p.grad for p in network.parameters()]
        finally:
            distributed.destroy_process_group()
    return {"backend": backend} | close(actual, expected, 32)


def _scaler(setup: Setup) -> dict:
    """Train in float16 with gradient scaling; a step that overflows must be skipped."""
    setup.require_gpu("float16 with gradient scaling")
    network = _network(setup)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14, growth_interval=10)
    x, target = (torch.randn(16, 13, n, device=setup.device) for n in (48, 5))
    losses = []
    for number in range(60):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16):
            out = network(x)
        loss = (out.float() - target).square().mean()
        scaler.scale(loss * (float("inf") if number == 30 else 1.0)).backward()
        before, scale = network[1].weight.clone(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if number == 30:
            assert torch.equal(before, network[1].weight), "a step that overflows was made"
            assert scaler.get_scale() < scale, "the scale was not reduced"
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in network.parameters()), "a parameter is not finite"
    assert losses[-1] < 0.9 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    return {"first loss": losses[0], "last loss": losses[-1], "scale": scaler.get_scale()}


def _start(setup: Setup, trainer: str, folder: Path, *options: str) -> subprocess.Popen:
    """Start a training with the options of the quickstart."""
    config = f"configs/{trainer}/digits.yaml"
    device = str(setup.device)
    command = [sys.executable, "-m", f"{trainer}.main", "--config", config, "--device", device]
    command += ["--output_dir", str(folder), *options]
    # Triton's interpreter is for checks only; a training in it would take hours.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".txt").open("w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def _finish(runs: dict[Path, subprocess.Popen]) -> None:
    """Wait for trainings.

    Raises:
        RuntimeError: One failed.
    """
    for folder, process in runs.items():
        status = process.wait()
        text = folder.with_suffix(".txt").read_text()
        print(f"--- {folder.name}\n{text}", flush=True)
        if status:
            last = " | ".join(text.strip().splitlines()[-_SHOWN_LINES:])
            raise RuntimeError(f"the training {folder.name} ended with {status}: {last}")


def _digits(setup: Setup) -> dict:
    """Train classifiers of digits, evaluate one, and check the gates of the quickstart."""
    require_packages(*_TRAINER_NEEDS)
    from datasets.embedded import write_digits
    from scripts.quickstart import classification as gates

    options = {
        "absolute_irpe": [],
        "irpe": ["--no-abs_pos_embed"],
        "neither": ["--no-abs_pos_embed", "--rpe", ""],
    }
    epochs = ["--epochs", "1", "--warmup_epochs", "0"] if setup.dry_run else []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = ["--data_path", str(write_digits(root / "digits")), *epochs]
        if setup.dry_run:
            options = {"absolute_irpe": []}
        _finish({root / n: _start(setup, "classification", root / n, *data, *flags)
                 for n, flags in options.items()})  # fmt: skip
        results = {n: gates.last_line(root / n) for n in options}
        top1 = {n: line["test_acc1"] for n, line in results.items()}
        if setup.dry_run:
            return {"top-1": top1, "gates": "not applied to one epoch of a dry run"}
        checkpoint = str(root / "absolute_irpe" / "checkpoint.pth")
        folder = root / "evaluation"
        flags = ["--eval", "--resume", checkpoint]
        _finish({folder: _start(setup, "classification", folder, *data, *flags)})
        evaluated = json.loads((folder / "eval.json").read_text())
        # The gates do not use the run without iRPE.
        failed = gates.failed_checks(results, evaluated)
    return {"top-1": top1, "errors": {f"gate {i}": text for i, text in enumerate(failed, 1)}}


def _scenes(setup: Setup) -> dict:
    """Train a detector on scenes and check the gate of the quickstart."""
    require_packages(*_TRAINER_NEEDS)
    (gates,) = require("scripts.quickstart.detection")
    from datasets.scenes import SceneOptions, write_scenes

    # The trainer writes its own scenes, but reads others as it reads COCO.
    tiny = ["--dataset_file", "coco", "--epochs", "1", "--warmup_steps", "1"]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        options = SceneOptions(train=16, val=4) if setup.dry_run else None
        data = ["--coco_path", str(write_scenes(root / "scenes", options))]
        # Results do not depend on the number of these processes.
        data += tiny if setup.dry_run else ["--num_workers", "4"]
        folder = root / "detection"
        _finish({folder: _start(setup, "detection", folder, *data)})
        line = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    found = {"AP": line["test_AP"], "AP50": line["test_AP50"]}
    if setup.dry_run:
        return found | {"gates": "not applied to one epoch of a dry run"}
    errors = {}
    if found["AP50"] < gates.MIN_AP50:
        errors["gate"] = f"AP50 must be at least {gates.MIN_AP50}, got {found['AP50']:.3f}"
    return found | {"errors": errors}
