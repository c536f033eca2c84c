"""The ways to compute an attention of one kind on a GPU: check each of them, and time it.

A candidate is `COMPOSED`, or a variant of an implementation of `rpe_ops.attention`. Torch's
`flex_attention` is none: its gradient of the lookups adds with atomics, in a random order, so a
resumed training would not repeat the same numbers.
"""

import logging
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import rpe_ops
from irpe_core.buckets import BUCKET_CACHE
from irpe_core.composed import composed_attention
from irpe_core.config import RPEConfig, format_rpe_spec
from irpe_core.encoding import build_rpe
from irpe_core.fused import fused_attention
from rpe_ops.compact_ids import is_small

__all__ = ["CANDIDATES", "COMPOSED", "Kind", "Size", "measure"]

logger = logging.getLogger(__name__)

COMPOSED = "composed"
# The first one that can run is used if there is no memory to time any.
CANDIDATES = (*(f"triton/{name}" for name in rpe_ops.VARIANTS["triton"]), COMPOSED)

# Largest difference to the reference, relative to the largest value. TF32 products have the
# precision of float16.
_TOLERANCE = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_WARMUP, _ROUNDS = 3, 10
_DROPOUT = 0.1


class Kind(NamedTuple):
    """Properties of an attention that decide which candidate is the fastest.

    Attributes:
        config: Encoding; its `rpe_on` has the letters that are present.
        heads: Number of heads.
        head_dim: Channels of a head.
        batch: Batch size, rounded up to a power of two.
        tokens: Number of tokens, rounded up to a power of two.
        dtype: Dtype of the products.
        masked: Whether keys are masked.
        dropout: Whether attention weights are dropped.
        training: Whether gradients are computed.
    """

    config: RPEConfig
    heads: int
    head_dim: int
    batch: int
    tokens: int
    dtype: torch.dtype
    masked: bool
    dropout: bool
    training: bool

    def __str__(self) -> str:
        flags = [name for name in ("masked", "dropout", "training") if getattr(self, name)]
        return " ".join(
            [
                f"{format_rpe_spec(self.config)} skip={self.config.skip}",
                f"heads={self.heads} head_dim={self.head_dim}",
                f"batch<={self.batch} tokens<={self.tokens}",
                str(self.dtype).removeprefix("torch."),
                *flags,
            ]
        )


class Size(NamedTuple):
    """Batch size and grid of an attention."""

    batch: int
    height: int
    width: int


def measure(kind: Kind, size: Size, device: torch.device) -> dict[str, float]:
    """Return the median time in seconds of every candidate that computes the right numbers.

    The forward pass and, for training, the backward pass are timed together. The state of the
    caller, such as its random numbers and autocast, has no effect and does not change.

    Args:
        kind: Kind of attention.
        size: Sizes to measure.
        device: Device to measure on.

    Returns:
        Times by name of the candidate, the fastest first.

    Raises:
        RuntimeError: No candidate computes the right numbers.
    """
    with _undisturbed(kind, device):
        sample = _make_problem(kind, size._replace(batch=1), min(kind.heads, 2), device)
        possible = [name for name in CANDIDATES if _is_possible(name, kind, size, device)]
        correct = [name for name in possible if _is_correct(name, sample)]
        if not correct:
            raise RuntimeError(
                f"no attention computes the right numbers for {kind} on {device}; the log has the "
                "reasons"
            )
        times = _time(correct, kind, size, device)
    # Without memory to time any candidate, the first one needs the least.
    return dict(sorted(times.items(), key=lambda item: item[1])) or {correct[0]: math.inf}


def _time(names: list[str], kind: Kind, size: Size, device: torch.device) -> dict[str, float]:
    """Return the median times of candidates, without those for which there is no memory."""
    times: dict[str, list[float]] = {name: [] for name in names}
    problem = None
    for _ in range(_WARMUP + _ROUNDS):
        # The candidates take turns, so that all see the same clock rate of the GPU.
        for name in list(times):
            try:
                problem = problem or _make_problem(kind, size, kind.heads, device)
                times[name].append(_seconds(problem, name))
            except torch.OutOfMemoryError:
                logger.warning("attention %s: out of memory for %s", name, kind)
                del times[name]
    return {name: statistics.median(found[_WARMUP:]) for name, found in times.items()}


def _is_possible(name: str, kind: Kind, size: Size, device: torch.device) -> bool:
    """Return whether a candidate exists for a grid of this size.

    Larger grids of the same kind, with up to twice as many tokens, then use it, too.
    """
    like = torch.empty(0, device=device)
    return not name.startswith("triton/flat") or is_small(
        BUCKET_CACHE.grid(kind.config, size.height, size.width, like)
    )


@dataclass(frozen=True)
class _Problem:
    """Random inputs of an attention.

    Attributes:
        qkv: Queries, keys and values `(B, H, L, d)`.
        encodings: `rpe_q`, `rpe_k` and `rpe_v`, or None.
        grid: Height and width in tokens.
        allowed: Mask of keys `(B, 1, 1, L)`, or None.
        grad_out: Gradient of the output.
        dropout_p: Probability of dropping an attention weight.
        training: Whether gradients are computed.
    """

    qkv: tuple[Tensor, ...]
    encodings: tuple[nn.Module | None, ...]
    grid: tuple[int, int]
    allowed: Tensor | None
    grad_out: Tensor
    dropout_p: float
    training: bool


def _make_problem(kind: Kind, size: Size, heads: int, device: torch.device) -> _Problem:
    """Make random inputs in the memory layout of a joint projection."""
    tokens = kind.config.skip + size.height * size.width
    shape = (size.batch, tokens, 3, heads, kind.head_dim)
    joint = torch.randn(shape, device=device, dtype=kind.dtype)
    qkv = tuple(x.transpose(1, 2).requires_grad_(kind.training) for x in joint.unbind(2))
    encodings = build_rpe(kind.config, kind.head_dim, heads)
    for encoding in encodings:
        for table in () if encoding is None else encoding.to(device, kind.dtype).parameters():
            nn.init.normal_(table)
    allowed = None
    if kind.masked:
        allowed = torch.ones(size.batch, 1, 1, tokens, dtype=torch.bool, device=device)
        allowed[..., tokens - tokens // 8 :] = False
    return _Problem(
        qkv,
        encodings,
        (size.height, size.width),
        allowed,
        torch.randn_like(qkv[0]),
        _DROPOUT if kind.dropout else 0.0,
        kind.training,
    )


def _attend(problem: _Problem, name: str, dropout_p: float) -> tuple[Tensor, ...]:
    """Return the output of a candidate and, for training, all gradients."""
    scale = problem.grad_out.shape[-1] ** -0.5
    arguments = (
        *problem.qkv, problem.encodings, problem.grid, problem.allowed, dropout_p, scale
    )  # fmt: skip
    if name == COMPOSED:
        out = composed_attention(*arguments)
    else:
        out = fused_attention(*arguments, name)
    if not problem.training:
        return (out,)
    tables = [p for e in problem.encodings if e is not None for p in e.parameters()]
    return out, *torch.autograd.grad(out, [*problem.qkv, *tables], problem.grad_out)


def _is_correct(name: str, problem: _Problem) -> bool:
    """Return whether a candidate runs and agrees with the reference; log why it does not."""
    # Composed attention draws other random numbers than the reference.
    dropout_p = 0.0 if name == COMPOSED else problem.dropout_p
    # `torch.manual_seed` would also seed the other GPUs.
    seed = torch.cuda.manual_seed if problem.grad_out.is_cuda else torch.manual_seed
    results = []
    try:
        for implementation in (name, "reference"):
            seed(0)
            results.append(_attend(problem, implementation, dropout_p))
    except Exception as error:  # A kernel that cannot be compiled raises errors of many types.
        logger.warning("attention %s cannot run: %s", name, error)
        return False
    for actual, expected in zip(*results, strict=True):
        difference = (actual.detach().float() - expected.detach().float()).abs().max()
        # NaN is not less than any number.
        if not difference <= _TOLERANCE[actual.dtype] * expected.float().abs().max():
            logger.warning("attention %s is wrong by up to %.3g", name, difference)
            return False
    return True


def _seconds(problem: _Problem, name: str) -> float:
    """Return the time of one pass of a candidate."""
    device = problem.grad_out.device
    if device.type != "cuda":
        start = time.perf_counter()
        _attend(problem, name, problem.dropout_p)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    _attend(problem, name, problem.dropout_p)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@contextmanager
def _undisturbed(kind: Kind, device: torch.device) -> Iterator[None]:
    """Isolate a measurement from the state of the caller: modes, autocast, random numbers."""
    on_gpu = device.type == "cuda"
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.set_grad_enabled(kind.training),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng([device] if on_gpu else []),
        torch.cuda.device(device) if on_gpu else nullcontext(),
    ):
        yield
