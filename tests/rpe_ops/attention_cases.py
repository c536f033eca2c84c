"""Random cases of fused attention, solved by kernels and by the float64 oracle."""

import copy
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from irpe_core import RPEConfig
from irpe_core.buckets import grid_buckets
from tests.rpe_ops.attention_oracle import Results, attend

__all__ = ["DEVICE", "Case", "Problem", "check"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """What is attended."""

    method: str = "product"
    rpe_on: str = "k"
    grid: tuple[int, int] = (3, 4)
    skip: int = 0
    dtype: torch.dtype = torch.float32
    padding: bool = False
    dropout_p: float = 0.0
    bias: bool = False
    batch: int = 1
    heads: int = 1
    dim: int = 16


def joint(case: Case, parts: int, length: int, device: str) -> list[Tensor]:
    """Random tensors in the layout of a joint projection, which is not contiguous."""
    values = torch.randn(case.batch, length, parts, case.heads, case.dim, dtype=torch.float64)
    return list(values.to(device, case.dtype).permute(2, 0, 3, 1, 4).unbind())


class Problem:
    """Random inputs of a case, their results by the kernels of a module and by the oracle."""

    def __init__(self, case: Case, kernels: ModuleType, device: str = DEVICE) -> None:
        self.case, self.kernels, self.device = case, kernels, device
        self.config = RPEConfig(ratio=1.9, method=case.method, skip=case.skip)
        self.buckets = grid_buckets(self.config, *case.grid, device)
        length = self.buckets.num_tokens
        self.q, self.k, self.v, self.grad_out = joint(case, 4, length, device)
        self.lookup_k, self.lookup_q = (
            self.values(length, bias=case.bias) if letter in case.rpe_on else None
            for letter in "kq"
        )
        self.grad_sums = self.values(length) if "v" in case.rpe_on else None
        self.padding = None
        if case.padding:
            self.padding = torch.rand(case.batch, length, device=device) < 0.3
            self.padding[0, 0] = False
            # The second element of the batch may attend nowhere.
            self.padding[1:2] = True
        self.seed = torch.tensor([-(2**62) + 12345], device=device)
        self.scale = case.dim**-0.5

    def values(self, length: int, *, bias: bool = False) -> Tensor:
        """A value per token and bucket; the same for every token and batch in bias mode."""
        shape = (self.case.batch, self.case.heads, length, self.buckets.num_lookups)
        drawn = (1, shape[1], 1, shape[3]) if bias else shape
        return (
            torch.randn(drawn, dtype=torch.float64).to(self.device, self.case.dtype).expand(shape)
        )

    def widened(self, kernels: ModuleType) -> "Problem":
        """The same in float64 for other kernels."""
        other = copy.copy(self)
        other.kernels = kernels
        for name in ("q", "k", "v", "lookup_k", "lookup_q", "grad_out", "grad_sums"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.double())
        return other

    def by_kernels(self) -> Results:
        inputs = (self.q, self.k, self.v, self.lookup_k, self.lookup_q, self.buckets)
        inputs = (*inputs, self.padding, self.seed)
        numbers = (self.scale, self.case.dropout_p)
        want_sums = self.grad_sums is not None
        out, sums, lse = self.kernels.attention_forward(*inputs, want_sums, *numbers)
        saved = (*inputs, out, sums, lse, *numbers)
        grads = self.kernels.attention_backward(self.grad_out, self.grad_sums, *saved)
        return Results(out, sums if want_sums else None, lse, *grads)

    def by_oracle(self) -> Results:
        inputs = (self.q, self.k, self.v, self.lookup_k, self.lookup_q, self.padding, self.seed)
        numbers = (self.scale, self.case.dropout_p)
        grads = (self.grad_out, self.grad_sums)
        return attend(self.config, *self.case.grid, *inputs, *numbers, *grads)


def check(actual: Results, expected: Results, dtype: torch.dtype) -> None:
    """Within a few roundings of the largest element: products are taken of rounded weights."""
    for name, x, y in zip(Results._fields, actual, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is None:
            continue
        wanted = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        assert x.dtype == wanted, name
        # Heads lie beside each other in the output alone.
        assert (x.transpose(1, 2) if name == "out" else x).is_contiguous(), name
        finite = torch.isfinite(y)
        largest = y[finite].abs().max().item() if finite.any() else 0.0
        roundings = 4 if wanted.itemsize == 2 else 16
        torch.testing.assert_close(
            x.double(),
            y,
            rtol=0,
            atol=roundings * torch.finfo(wanted).eps * max(1.0, largest),
            msg=lambda message, name=name: f"{name}: {message}",
        )
