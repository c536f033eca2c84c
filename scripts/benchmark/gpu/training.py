"""Section `train`: images per second of training steps over the same models without iRPE.

A step is forward, backward and AdamW, as in `scripts.benchmark.train`, on images that are already
on the GPU. For some models torch's profiler gives the time per kernel. The host-bound share is the
part of a step in which no kernel runs: 1 - (time of all kernels / time of the step).
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from irpe_core import set_implementation
from scripts.benchmark.gpu.comparison import short
from scripts.benchmark.gpu.setup import Check, Setup, require, require_packages
from scripts.benchmark.timing import clock, median_ratio

__all__ = ["checks"]

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_SPECS = {"without iRPE": "", "k": "rpe-{}-product-ctx-1-k", "qkv": "rpe-{}-product-ctx-1-qkv"}
# Model, batch size, data type, compiled. Most important first: the time may end before the last.
_CASES = [
    ("DeiT-S", 128, _BF16, False),
    ("DETR-R50", 2, _FP32, False),
    ("DeiT-B", 128, _BF16, False),
    ("DeiT-S", 128, _BF16, True),
    ("DETR-R50", 4, _BF16, False),
    ("DeiT-S", 128, _FP16, False),
    *(("DeiT-S", batch, _BF16, False) for batch in (64, 256)),
    *(("DeiT-B", batch, _BF16, False) for batch in (64, 256)),
    ("DeiT-B", 128, _FP16, False),
    ("DeiT-B", 128, _BF16, True),
    ("DeiT-S", 256, _FP16, True),
]
_TINY = [("DeiT-S", 2, _BF16, False), ("DeiT-S", 2, _FP32, True), ("DETR-R50", 1, _BF16, False)]
_STEPS, _ROUNDS = 4, 4
_KERNELS = 14


def checks(setup: Setup) -> dict[str, Check]:
    """Return the checks of this section by name."""
    found: dict[str, Check] = {}
    for model, batch, dtype, is_compiled in _TINY if setup.dry_run else _CASES:
        title = f"{model}, B {batch}, {short(dtype)}{', compiled' if is_compiled else ''}"
        found[title] = partial(_measure, setup, model, batch, dtype, is_compiled)
    return found


def _measure(setup: Setup, model: str, batch: int, dtype: torch.dtype, is_compiled: bool) -> dict:
    """Measure a model with and without iRPE."""
    benchmark = _benchmark(model)
    torch.compiler.reset()
    size = _image_size(setup, model)
    images = torch.randn(batch, 3, *size, device=setup.device)
    steps, rows, errors = {}, {}, {}
    for name, spec in _SPECS.items():
        try:
            network = _model(setup, benchmark, model, spec)
            row = {"parameters": sum(p.numel() for p in network.parameters())}
            row["operators"] = set_implementation(network, "auto", setup.device)
            step = benchmark.train_step(_compiled(setup, network, is_compiled), images, dtype)
            start = time.perf_counter()
            for _ in range(1 if setup.dry_run else 3):
                step()
            row["first_steps_s"] = clock(setup.device) - start
            steps[name], rows[name] = step, row
        except Exception as error:
            # A model that fails, for example without memory, must not hide the others.
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    times = _times(steps, setup)
    for name, seconds in times.items():
        rows[name] |= _speed(seconds, times.get("without iRPE"), batch)
        if not is_compiled and not (setup.dry_run and model == "DETR-R50"):
            try:
                rows[name] |= _profile(setup, steps[name], rows[name]["step_ms"] / 1e3)
            except Exception as error:
                # The profiler needs a library that some machines lack; the speed is measured.
                rows[name]["profile"] = f"{type(error).__name__}: {error}"[:80]
    return {"rows": rows, "errors": errors}


def _benchmark(model: str):
    """Import `scripts.benchmark.train`, and for DETR what its model needs."""
    if model.startswith("DETR"):
        require_packages("pydantic", "yaml", "torchvision", "pycocotools", "scipy", "tqdm")
    (module,) = require("scripts.benchmark.train")
    return module


def _image_size(setup: Setup, model: str) -> tuple[int, int]:
    """Return height and width of the images."""
    if model.startswith("DETR"):
        return (64, 96) if setup.dry_run else (608, 800)
    return (32, 32) if setup.dry_run else (224, 224)


def _model(setup: Setup, benchmark, model: str, spec: str) -> nn.Module:
    """Build a model that returns its loss."""
    torch.manual_seed(0)
    if model.startswith("DETR"):
        return benchmark.Detector(spec.format("2.0")).to(setup.device)
    size = {"DeiT-S": "small", "DeiT-B": "base"}[model]
    tiny = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3} if setup.dry_run else {}
    name = f"deit_{size}_patch16_224"
    return benchmark.Classifier(name, spec.format("1.9"), **tiny).to(setup.device)


def _compiled(setup: Setup, network: nn.Module, is_compiled: bool) -> nn.Module:
    """Compile a model; in a dry run only trace it."""
    if not is_compiled:
        return network
    return torch.compile(network, **({"backend": "aot_eager"} if setup.dry_run else {}))


def _times(steps: dict[str, Callable[[], None]], setup: Setup) -> dict[str, list[float]]:
    """Return the seconds of one step in every round, all models alternately."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    count = 1 if setup.dry_run else _STEPS
    for _ in range(1 if setup.dry_run else _ROUNDS):
        for name, step in steps.items():
            start = clock(setup.device)
            for _ in range(count):
                step()
            times[name].append((clock(setup.device) - start) / count)
    return times


def _speed(seconds: list[float], base: list[float] | None, batch: int) -> dict:
    """Return the time of a step, images per second and their ratio to the base."""
    median = statistics.median(seconds)
    ratio = base and median_ratio(base, seconds)
    return {"step_ms": 1e3 * median, "images_per_second": batch / median, "ratio": ratio}


def _profile(setup: Setup, step: Callable[[], None], seconds: float) -> dict:
    """Return the share of every kernel in the time of all kernels, and the host-bound share."""
    activity = torch.profiler.ProfilerActivity
    kind = activity.CUDA if setup.on_gpu else activity.CPU
    count = 1 if setup.dry_run else 3
    with torch.profiler.profile(activities=[kind]) as profile:
        for _ in range(count):
            step()
        clock(setup.device)
    totals = {event.key: _self_time(event, setup) for event in profile.key_averages()}
    totals = {name: total / count / 1e6 for name, total in totals.items() if total > 0}
    busy = sum(totals.values())
    if not busy:
        return {"profile": "the profiler recorded no kernel"}
    largest = sorted(totals, key=totals.get, reverse=True)[:_KERNELS]
    kernels = [[name[:90], totals[name] / busy, 1e3 * totals[name]] for name in largest]
    host_bound = max(0.0, 1 - busy / seconds) if setup.on_gpu else None
    return {"kernels": kernels, "kernels_ms": 1e3 * busy, "host_bound": host_bound}


def _self_time(event, setup: Setup) -> float:
    """Return the microseconds of a kernel; releases of torch differ in the attribute's name."""
    if not setup.on_gpu:
        return event.self_cpu_time_total
    # Annotations of torch also appear on the device, around the kernels that are counted already.
    is_annotation = getattr(event, "is_user_annotation", False) or "#" in event.key
    if is_annotation or str(getattr(event, "device_type", "CUDA")).rpartition(".")[2] != "CUDA":
        return 0.0
    names = ("self_device_time_total", "self_cuda_time_total")
    return next((getattr(event, name) for name in names if hasattr(event, name)), 0.0)
