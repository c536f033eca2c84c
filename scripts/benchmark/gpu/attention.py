"""Section `attention`: time and peak memory of attention over flash attention without encodings.

The attentions are those of `scripts.benchmark.ops`. GPU times are measured by events, with the GPU
delayed so that it never waits for the host; the time of the host is measured apart. All attentions
of a check run alternately, and a ratio is the median of the ratios in the same round.
"""

import itertools
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.benchmark import ops
from scripts.benchmark.gpu.choices import FACTORS, changed_tiles, families, family, tile_fields
from scripts.benchmark.gpu.comparison import short
from scripts.benchmark.gpu.setup import Check, Setup, SkipError, require
from scripts.benchmark.peak_memory import peak_memory
from scripts.benchmark.timing import median_ratio, timed

__all__ = ["checks"]

BASE = "flash, no encoding"
_ROUNDS = 15
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_TINY = ops.Shape(1, 1, 1, 16, (2, 3), 1, 1.9)
# Most important first: the time may end before the last.
_CASES = [
    *((name, batch, letters, _BF16) for name, batch in (("DeiT-S", 128), ("DETR 50x84", 2))
      for letters in ("k", "qkv")),
    *((name, batch, letters, _BF16) for name, batch in (("DETR 25x42", 2), ("DeiT-B", 128))
      for letters in ("k", "qkv")),
    *((name, batch, letters, _BF16) for name in ("DeiT-S", "DeiT-B") for batch in (64, 256)
      for letters in ("k", "qkv")),
    *(("DeiT-S", 128, letters, dtype) for dtype in (_FP16, _FP32) for letters in ("k", "qkv")),
    ("DETR 50x84", 2, "k", _FP32),
    ("DeiT-S", 128, "qk", _BF16),
]  # fmt: skip
_FLEX = [("DeiT-S", 128), ("DETR 50x84", 2)]
_SWEEPS = [("DeiT-S", 128, "k"), ("DETR 50x84", 2, "k"), ("DeiT-S", 128, "qkv")]


def checks(setup: Setup) -> dict[str, Check]:
    """Return the checks of this section by name."""
    cases = [("tiny", 1, "k", _FP32), ("tiny", 1, "qkv", _BF16)] if setup.dry_run else _CASES
    flex = [("tiny", 1)] if setup.dry_run else _FLEX
    sweeps = [("tiny", 1, "k")] if setup.dry_run else _SWEEPS
    changes = list(itertools.product(tile_fields(), FACTORS))
    found: dict[str, Check] = {}
    for number, (name, batch, letters, dtype) in enumerate(cases):
        title = f"{name}, B {batch}, {letters}, {short(dtype)}"
        found[title] = partial(_measure, setup, name, batch, letters, dtype)
        # FlexAttention comes when every shape was measured once.
        for name, batch in flex if number == min(7, len(cases) - 1) else ():
            found[f"flex_attention: {name}, B {batch}, k"] = partial(_flex, setup, name, batch)
    for name, batch, letters in sweeps:
        for kernels in families():
            title = f"tiles, kernels {kernels}: {name}, B {batch}, {letters}"
            found[title] = partial(_family, setup, name, batch, letters, kernels)
        for field, factor in changes[: 1 if setup.dry_run else None]:
            title = f"tiles, {field} x {factor:g}: {name}, B {batch}, {letters}"
            found[title] = partial(_tiles, setup, name, batch, letters, field, factor)
    return found


def _shape(setup: Setup, name: str, batch: int) -> ops.Shape:
    """Return the sizes of an attention."""
    shape = _TINY if setup.dry_run else ops.SHAPES[name]
    return replace(shape, batch=batch, cpu_batch=batch)


def _measure(setup: Setup, name: str, batch: int, letters: str, dtype: torch.dtype) -> dict:
    """Measure all attentions of one shape."""
    shape, not_run = _shape(setup, name, batch), {}
    found = ops.attentions(shape, letters, setup.device, dtype, not_run, interpreted=setup.dry_run)
    found.pop("flex_attention", None)
    not_run = {k: reason for k, reason in not_run.items() if not k.startswith("flex_attention")}
    tasks = {BASE: _flash_attention, "torch's choice, no encoding": found.pop("sdpa")} | found
    return _rows(setup, shape, dtype, tasks) | {"not run": not_run}


def _flex(setup: Setup, name: str, batch: int) -> dict:
    """Measure FlexAttention, which is compiled for this shape."""
    setup.require_gpu("the backward of flex_attention")
    require("torch.nn.attention.flex_attention")
    shape, dtype = _shape(setup, name, batch), _BF16
    found = ops.attentions(shape, "k", setup.device, dtype, {})
    tasks = {BASE: _flash_attention, "flex_attention": found["flex_attention"]}
    return _rows(setup, shape, dtype, tasks)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention by torch's flash attention; in float32 by torch's choice."""
    context = nullcontext()
    if q.dtype != torch.float32:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        context = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    with context:
        return F.scaled_dot_product_attention(q, k, v)


def _rows(
    setup: Setup, shape: ops.Shape, dtype: torch.dtype, attentions: dict[str, ops.Attention]
) -> dict:
    """Return times, ratios and peak memory of every attention, and errors by attention."""
    length = shape.skip + shape.grid[0] * shape.grid[1]
    sizes = (shape.batch, length, 3, shape.heads, shape.dim)
    joint = torch.randn(sizes, device=setup.device, dtype=dtype)
    inputs = [x.detach().requires_grad_() for x in joint.permute(2, 0, 3, 1, 4).unbind(0)]
    # The gradient of a linear projection has this memory order.
    grad = torch.randn(shape.batch, length, shape.heads, shape.dim, device=setup.device)
    grad = grad.to(dtype).transpose(1, 2)
    tasks, peaks, errors = {}, {}, {}
    for name, attention in attentions.items():
        forward = partial(_forward, attention, inputs)
        both = partial(_forward_and_backward, attention, inputs, grad)
        try:
            forward()
            both()
            peaks[name] = peak_memory(both, setup.device) / 1e6
        except Exception as error:
            # One attention that fails, for example without memory, must not hide the others.
            errors[name] = f"{type(error).__name__}: {error}"[:300]
            continue
        tasks[name] = forward, both
    times = _times(tasks, setup)
    rows = {name: _row(times, name) | {"peak_mb": peaks[name]} for name in tasks}
    return {"rows": rows, "errors": errors}


def _forward(attention: ops.Attention, inputs: list[Tensor]) -> None:
    """Run the forward pass."""
    with torch.no_grad():
        attention(*inputs)


def _forward_and_backward(attention: ops.Attention, inputs: list[Tensor], grad: Tensor) -> None:
    """Run the forward and the backward pass."""
    torch.autograd.backward(attention(*inputs), grad)
    for x in inputs:
        x.grad = None


def _times(tasks: dict[str, tuple[Callable, Callable]], setup: Setup) -> dict:
    """Return the seconds of the device and of the host by attention, pass and round."""
    times: dict = {}
    for number in range(1 if setup.dry_run else _ROUNDS + 2):
        for name, passes in tasks.items():
            for kind, work in zip(("forward", "both"), passes, strict=True):
                seconds, host = timed(work, setup.device)
                if number >= 2 or setup.dry_run:
                    times.setdefault((name, kind), []).append(seconds)
                    times.setdefault((name, kind, "host"), []).append(host)
    return times


def _row(times: dict, name: str) -> dict[str, float | None]:
    """Return the medians of an attention, and its ratios to flash attention."""
    row: dict[str, float | None] = {}
    for kind in ("forward", "both"):
        row[f"{kind}_ms"] = 1e3 * statistics.median(times[name, kind])
        base = times.get((BASE, kind))
        row[f"{kind}_ratio"] = base and median_ratio(times[name, kind], base)
    row["host_us"] = 1e6 * statistics.median(times[name, "both", "host"])
    return row


def _tiles(setup: Setup, name: str, batch: int, letters: str, field: str, factor: float) -> dict:
    """Measure the fused attention by Triton with other tiles than the chosen ones."""
    with changed_tiles(field, factor) as chosen:
        result = _changed(setup, name, batch, letters, f"{field} x {factor:g}")
    if not chosen:
        raise SkipError(f"no tiles of this shape have the size {field}")
    return result | {"tiles": list(chosen)}


def _family(setup: Setup, name: str, batch: int, letters: str, kernels: str) -> dict:
    """Measure the fused attention by one family of Triton kernels."""
    with family(kernels):
        return _changed(setup, name, batch, letters, f"kernels {kernels}")


def _changed(setup: Setup, name: str, batch: int, letters: str, change: str) -> dict:
    """Measure the fused attention by Triton under a change of its choices."""
    shape, dtype = _shape(setup, name, batch), _FP32 if setup.dry_run else _BF16
    found = ops.attentions(shape, letters, setup.device, dtype, {}, interpreted=setup.dry_run)
    if "fused, triton" not in found:
        raise SkipError("Triton cannot run")
    attentions = {BASE: _flash_attention, change: found["fused, triton"]}
    result = _rows(setup, shape, dtype, attentions)
    # A choice that cannot be compiled is a finding of the sweep and not a failure.
    return result | {"not run": result.pop("errors")}
