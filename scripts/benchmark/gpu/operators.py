"""Checks of gather and bucket sum against a dense one-hot product in float64."""

import itertools
from functools import partial

import torch
from torch import Tensor

import rpe_ops
from scripts.benchmark.gpu.comparison import short
from scripts.benchmark.gpu.setup import Check, Setup, poisoned_memory, require_implementation

__all__ = ["checks"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Leading dimensions, L_q, L_k, K.
_SIZES = [
    ((2, 3), 197, 197, 50),
    ((2, 3), 63, 63, 49),
    ((3, 3), 3, 45, 70),
    ((1, 1), 1, 1, 1),
    ((2,), 2, 150, 13),
    ((), 33, 7, 3),
    ((2,), 3, 0, 4),
    ((0, 2), 3, 5, 4),
]
_LAYOUTS = [
    lambda x: x,
    lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    lambda x: x[:1].expand_as(x) if x.ndim > 2 else x,
    lambda x: x.repeat_interleave(2, -1)[..., ::2],
]


def checks(setup: Setup, implementation: str, *, large: bool = True) -> dict[str, Check]:
    """Return the checks of an implementation by name."""
    found: dict[str, Check] = {
        f"gather, {implementation}: {short(dtype)}": partial(
            _equations, setup, implementation, dtype
        )
        for dtype in _DTYPES
    }
    if large:
        found |= {
            f"gather, {implementation}: more than 2^31 elements": partial(
                setup.alone, 12, _large, setup, implementation
            ),
            f"gather, {implementation}: strides above 2^31 elements": partial(
                setup.alone, 6, _large_strides, setup, implementation
            ),
        }
    return found


def _equations(setup: Setup, implementation: str, dtype: torch.dtype) -> dict:
    """Check values and gradients of all sizes, layouts and types of bucket ids."""
    require_implementation(implementation, setup, "gather")
    count, worst = 0, 0.0
    sizes = [((2,), 2, 5, 3), ((1, 1), 1, 1, 1)] if setup.dry_run else _SIZES
    for size, layout, id_dtype in itertools.product(sizes, _LAYOUTS, (torch.int32, torch.int64)):
        leading, queries, keys, buckets = size
        ids = torch.randint(buckets, (queries, keys), dtype=id_dtype, device=setup.device)
        lookup, pairs = (
            layout(torch.randn(*leading, queries, n).to(setup.device, dtype))
            for n in (buckets, keys)
        )
        gathered, summed = _both(lookup, pairs, ids, implementation)
        dense = (ids.long()[..., None] == torch.arange(buckets, device=ids.device)).double()
        expected = torch.einsum("...ik,ijk->...ij", lookup.double(), dense)
        for x in gathered:
            assert torch.equal(x.double(), expected), f"gather of {size} differs"
        for x in summed:
            worst = max(worst, _check_sum(x, pairs, dense, size))
        count += 1
    return {"dtype": short(dtype), "cases": count, "roundings": worst, "allowed": 1.0}


def _both(
    lookup: Tensor, pairs: Tensor, ids: Tensor, implementation: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Return gather and bucket sum, each also as the gradient of the other."""
    lookup, pairs = lookup.detach().requires_grad_(), pairs.detach().requires_grad_()
    with poisoned_memory():
        gathered = rpe_ops.gather(lookup, ids, implementation=implementation)
        summed = rpe_ops.bucket_sum(pairs, ids, lookup.shape[-1], implementation=implementation)
        (grad_lookup,) = torch.autograd.grad(gathered, lookup, pairs.detach())
        (grad_pairs,) = torch.autograd.grad(summed, pairs, lookup.detach())
    return [gathered.detach(), grad_pairs], [summed.detach(), grad_lookup]


def _check_sum(actual: Tensor, pairs: Tensor, dense: Tensor, size: tuple) -> float:
    """Compare bucket sums, up to roundings of a sum in float32 and one of the result.

    Returns:
        The largest difference as a part of the one that is allowed.
    """
    dtype = actual.dtype
    expected = torch.einsum("...ij,ijk->...ik", pairs.double(), dense)
    magnitude = torch.einsum("...ij,ijk->...ik", pairs.double().abs(), dense)
    allowed = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * magnitude
    allowed += torch.finfo(dtype).eps * expected.abs()
    difference = (actual.double() - expected).abs()
    assert actual.isfinite().all(), f"a bucket sum of {size} is not finite"
    assert (difference <= allowed).all(), f"a bucket sum of {size} differs"
    parts = difference[allowed > 0] / allowed[allowed > 0]
    return parts.max().item() if parts.numel() else 0.0


def _large(setup: Setup, implementation: str) -> dict:
    """Check gather and bucket sum of more than 2³¹ pairs."""
    require_implementation(implementation, setup, "gather")
    side, buckets = (4096, 50) if setup.on_gpu else (32, 5)
    slices = 2**31 // side**2 + 1 if setup.on_gpu else 3
    options = {"implementation": implementation, "check_bounds": False}
    ids = torch.randint(buckets, (side, side), device=setup.device)
    lookup = torch.randn(slices, side, buckets, device=setup.device).bfloat16()
    pairs = rpe_ops.gather(lookup, ids, **options)
    sums = rpe_ops.bucket_sum(pairs, ids, buckets, **options)
    counts = torch.zeros(side, buckets, device=setup.device)
    counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
    for i in range(slices):
        assert torch.equal(pairs[i], lookup[i].gather(-1, ids)), f"gather of slice {i} differs"
        torch.testing.assert_close(
            sums[i].float(), lookup[i].float() * counts, rtol=2**-7, atol=1e-3
        )
    return {"elements": pairs.numel()}


def _large_strides(setup: Setup, implementation: str) -> dict:
    """Check lookups and pairs whose slices are far apart in memory."""
    require_implementation(implementation, setup, "gather")
    far = 2 ** (31 if setup.on_gpu else 12) + 8
    memory = torch.empty(far + 4096, dtype=torch.bfloat16, device=setup.device)
    ids = torch.randint(13, (9, 7), device=setup.device)
    for sizes, strides in (((1, 2, 9), (8, far, 13)), ((2, 1, 9), (far, 8, 13))):
        values = [torch.randn(*sizes, n).to(setup.device, torch.bfloat16) for n in (13, 7)]
        views = []
        for x, offset in zip(values, (0, 2048), strict=True):
            views.append(memory.as_strided(x.shape, (*strides, 1), offset).copy_(x))
        options = {"implementation": implementation, "check_bounds": False}
        gathered = rpe_ops.gather(views[0], ids, **options)
        summed = rpe_ops.bucket_sum(views[1], ids, 13, **options)
        wide = ids.expand(*sizes, 7)
        assert torch.equal(gathered, values[0].gather(-1, wide)), "gather differs"
        dense = (ids[..., None] == torch.arange(13, device=ids.device)).double()
        _check_sum(summed, values[1], dense, sizes)
    return {}
