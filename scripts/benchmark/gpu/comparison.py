"""Comparison of results, and the operators as functions that can run on any stream or device."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import rpe_ops
from irpe_core import RPEConfig
from irpe_core.buckets import grid_buckets

__all__ = ["Workload", "attention_workload", "close", "gather_workload", "roundings", "short"]


def short(dtype: torch.dtype) -> str:
    """Return the name of a data type without `torch.`."""
    return str(dtype).removeprefix("torch.")


def roundings(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Return the largest difference in roundings of `dtype` of the largest element, at least 1."""
    finite = torch.isfinite(expected)
    if not finite.any():
        return 0.0
    largest = max(1.0, expected[finite].abs().max().item())
    difference = (actual.double() - expected.double())[finite].abs().max().item()
    return difference / (largest * torch.finfo(dtype).eps)


def close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], allowed: float
) -> dict[str, float | None]:
    """Compare tensors with the largest element times their rounding times `allowed`.

    Returns:
        The largest difference that was found and the one that is allowed, in roundings.

    Raises:
        AssertionError: A difference is larger, or a value is not finite.
    """
    worst = 0.0
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.shape == y.shape, f"result {i} has shape {tuple(x.shape)}, not {tuple(y.shape)}"
        x = x.to(y.device)
        assert torch.isfinite(x).all(), f"result {i} is not finite"
        found = roundings(x, y, x.dtype)
        assert found <= allowed, f"result {i} differs by {found:.3g} roundings of {allowed:g}"
        worst = max(worst, found)
    return {"roundings": worst, "allowed": allowed}


class Workload(NamedTuple):
    """A forward and a backward pass as a function of tensors on one device.

    Attributes:
        inputs: The tensors.
        run: The function; returns the output and all gradients.
    """

    inputs: list[Tensor]
    run: Callable[..., list[Tensor]]


def attention_workload(
    implementation: str,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    grid: tuple[int, int] = (7, 9),
    dim: int = 32,
    batch: int = 2,
    heads: int = 3,
    dropout_p: float = 0.0,
) -> Workload:
    """Return `rpe_ops.attention` with encodings on queries, keys and values."""
    config = RPEConfig(ratio=1.9, method="product", skip=1)
    # Made before a CUDA graph is captured, because it copies from the host.
    buckets = functools.cache(lambda device: grid_buckets(config, *grid, device))
    sizes = buckets(torch.device("cpu"))
    shapes = [(batch, heads, sizes.num_tokens, dim)] * 3
    shapes += [(1, dim, sizes.num_lookups)] * 2 + [(1, sizes.num_lookups, dim)]
    inputs = [torch.randn(shape).to(device, dtype) for shape in [*shapes, shapes[0]]]
    inputs[3:6] = [table / 4 for table in inputs[3:6]]

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors[:-1]]
        q, k, v, table_k, table_q, table_v = leaves
        out = rpe_ops.attention(
            q,
            k,
            v,
            buckets(q.device),
            table_k=table_k,
            table_q=table_q,
            table_v=table_v,
            dropout_p=dropout_p,
            implementation=implementation,
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[-1])]

    return Workload(inputs, run)


def gather_workload(
    implementation: str, dtype: torch.dtype, device: torch.device | str, *, tokens: int = 63
) -> Workload:
    """Return gather and bucket sum, with their gradients."""
    ids = torch.randint(50, (tokens, tokens))
    inputs = [torch.randn(2, 3, tokens, n).to(device, dtype) for n in (50, tokens)]
    on_device = functools.cache(lambda device: ids.to(device))

    def run(lookup: Tensor, pairs: Tensor) -> list[Tensor]:
        lookup, pairs = lookup.detach().requires_grad_(), pairs.detach().requires_grad_()
        options = {"implementation": implementation, "check_bounds": False}
        gathered = rpe_ops.gather(lookup, on_device(lookup.device), **options)
        summed = rpe_ops.bucket_sum(pairs, on_device(pairs.device), 50, **options)
        (grad_lookup,) = torch.autograd.grad(gathered, lookup, pairs.detach())
        (grad_pairs,) = torch.autograd.grad(summed, pairs, lookup.detach())
        return [gathered.detach(), summed.detach(), grad_lookup, grad_pairs]

    return Workload(inputs, run)
