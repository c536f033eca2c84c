"""Random cases of fused attention, computed by kernels and by the float64 oracle."""

import copy
import itertools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from irpe_core import RPEConfig
from irpe_core.buckets import grid_buckets
from tests.rpe_ops.attention_oracle import Results, attend

__all__ = ["DEVICE", "GRIDS", "SETTINGS", "Case", "Problem", "check"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """Settings of one attention."""

    method: str = "product"
    rpe_on: str = "k"
    grid: tuple[int, int] = (3, 4)
    skip: int = 0
    dtype: torch.dtype = torch.float32
    padding: bool = False
    dropout_p: float = 0.0
    bias: bool = False
    shared: bool = True
    batch: int = 1
    heads: int = 1
    dim: int = 16


# Every implementation is tested with these, for every method and dtype.
GRIDS = [(7, 9), (5, 5), (1, 1), (1, 17)]
SETTINGS = [
    Case(rpe_on=rpe_on, skip=skip, padding=hard, dropout_p=0.1 * hard, batch=2, heads=2)
    for rpe_on, skip, hard in itertools.product(
        ("k", "q", "v", "qkv", ""), (0, 1, 2), (False, True)
    )
]
SETTINGS += [
    Case(rpe_on="qk", skip=1, bias=True, batch=2, heads=3),
    Case(rpe_on="qk", skip=2, bias=True, shared=False, batch=2, heads=3, padding=True),
    Case(rpe_on="qkv", skip=1, shared=False, batch=2, heads=3, padding=True, dropout_p=0.1),
]


def joint(case: Case, parts: int, length: int, device: str) -> list[Tensor]:
    """Return random tensors in the layout of a joint projection, which is not contiguous."""
    values = torch.randn(case.batch, length, parts, case.heads, case.dim, dtype=torch.float64)
    return list(values.to(device, case.dtype).permute(2, 0, 3, 1, 4).unbind())


class Problem:
    """Random inputs of a case, with the results of a module of kernels and of the oracle."""

    def __init__(self, case: Case, kernels: ModuleType, device: str = DEVICE) -> None:
        self.case, self.kernels, self.device = case, kernels, device
        self.config = RPEConfig(ratio=1.9, method=case.method, skip=case.skip)
        self.buckets = grid_buckets(self.config, *case.grid, device)
        length = self.buckets.num_tokens
        self.q, self.k, self.v, self.grad_out = joint(case, 4, length, device)
        self.table_k, self.table_q, self.table_v = (
            self.table(letter) if letter in case.rpe_on else None for letter in "kqv"
        )
        self.padding = None
        if case.padding:
            self.padding = torch.rand(case.batch, length, device=device) < 0.3
            self.padding[0, 0] = False
            # All keys of the second element of the batch are padded.
            self.padding[1:2] = True
        self.seed = torch.tensor([-(2**62) + 12345], device=device)
        self.scale = case.dim**-0.5

    def table(self, letter: str) -> Tensor:
        """Return a random table, smaller than queries and keys as learned tables are."""
        case, lookups = self.case, self.buckets.num_lookups
        shape = {"v": (lookups, case.dim)}.get(letter, (case.dim, lookups))
        if case.bias:
            shape = (lookups,)
        drawn = torch.randn(1 if case.shared else case.heads, *shape, dtype=torch.float64)
        return (drawn / 4).to(self.device, case.dtype)

    def widened(self, kernels: ModuleType) -> "Problem":
        """Return the same problem in float64 for other kernels."""
        other = copy.copy(self)
        other.kernels = kernels
        for name in ("q", "k", "v", "table_k", "table_q", "table_v", "grad_out"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.double())
        return other

    def by_kernels(self) -> Results:
        inputs = (self.q, self.k, self.v, self.table_k, self.table_q, self.table_v, self.buckets)
        inputs = (*inputs, self.padding, self.seed)
        numbers = (self.scale, self.case.dropout_p)
        out, sums, lse = self.kernels.attention_forward(*inputs, *numbers)
        grads = self.kernels.attention_backward(self.grad_out, *inputs, out, sums, lse, *numbers)
        return Results(out, None if self.table_v is None else sums, lse, *grads)

    def by_oracle(self) -> Results:
        inputs = (self.q, self.k, self.v, self.table_k, self.table_q, self.table_v)
        numbers = (self.scale, self.case.dropout_p, self.grad_out)
        return attend(self.config, *self.case.grid, *inputs, self.padding, self.seed, *numbers)


def check(
    actual: Results, expected: Results, dtype: torch.dtype, *, rounds_lookups: bool = False
) -> None:
    """Compare results, with a tolerance in roundings of the largest element.

    The tolerance is 32 roundings (20 were observed), or 4 in 16 bits (3 were observed). It is more
    than one because weights are rounded before their products, and because the gradient of a table
    is a sum over all tokens with partial cancellation. With `rounds_lookups` the logits have the
    precision of `dtype`, which may be lower than that of lse, and the tolerance in 16 bits is 8
    (5 were observed).
    """
    for name, x, y in zip(Results._fields, actual, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is None:
            continue
        wanted = torch.promote_types(dtype, torch.float32) if name == "lse" else dtype
        assert x.dtype == wanted, name
        # Tensors in the shape of the queries have the memory order (B, L, H, d).
        of_tokens = name in ("out", "grad_q", "grad_k", "grad_v")
        assert (x.transpose(1, 2) if of_tokens else x).is_contiguous(), name
        finite = torch.isfinite(y)
        largest = y[finite].abs().max().item() if finite.any() else 0.0
        precision = dtype if rounds_lookups else wanted
        roundings = (8 if rounds_lookups else 4) if precision.itemsize == 2 else 32
        torch.testing.assert_close(
            x.double(),
            y,
            rtol=0,
            atol=roundings * torch.finfo(precision).eps * max(1.0, largest),
            msg=lambda message, name=name: f"{name}: {message}",
        )
