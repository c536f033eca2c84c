"""Triton's gather and bucket sum against a dense one-hot oracle; on the CPU in the interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from rpe_ops.triton_kernels import bucket_sum, gather

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Leading dimensions, L_q, L_k, K: smaller and larger than a block in every dimension.
SIZES = {
    "5x9": ((3, 3), 3, 45, 70),
    "one": ((1, 1), 1, 1, 1),
    "wide": ((2,), 2, 150, 13),
    "matrix": ((), 4, 33, 65),
    "no-keys": ((2,), 3, 0, 4),
    "no-rows": ((0, 2), 3, 5, 4),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "last-two-swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads-inside": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "expanded": lambda x: x[:1].expand_as(x),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def random_ids(l_q: int, l_k: int, k: int) -> Tensor:
    return torch.randint(k, (l_q, l_k), device=DEVICE)


def one_hot(ids: Tensor, k: int) -> Tensor:
    return (ids[..., None] == torch.arange(k, device=DEVICE)).double()


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with a tolerance for sums in float32 or wider that are rounded once."""
    assert actual.dtype == dtype
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(
        actual, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=32 * eps
    )


@sizes
@dtypes
def test_gather_reads_the_bucket_of_every_pair(size, dtype):
    leading, l_q, l_k, k = size
    lookup, ids = (
        torch.randn(*leading, l_q, k, device=DEVICE).to(dtype),
        random_ids(l_q, l_k, k),
    )
    expected = torch.einsum("...ik,ijk->...ij", lookup.double(), one_hot(ids, k))
    assert torch.equal(gather(lookup, ids), expected.to(dtype))


@sizes
@dtypes
def test_bucket_sum_adds_the_pairs_of_every_bucket(size, dtype):
    leading, l_q, l_k, k = size
    pairs, ids = (
        torch.randn(*leading, l_q, l_k, device=DEVICE).to(dtype),
        random_ids(l_q, l_k, k),
    )
    expected = torch.einsum("...ij,ijk->...ik", pairs.double(), one_hot(ids, k))
    check(bucket_sum(pairs, ids, k), expected, dtype)


@layouts
def test_any_strides_of_values_and_bucket_ids(layout):
    ids = random_ids(3, 10, 7)
    lookup, pairs = (layout(torch.randn(2, 2, 3, n, device=DEVICE)) for n in (7, 10))
    for same in (ids.int(), ids.t().contiguous().t(), ids.repeat_interleave(2, -1)[:, ::2]):
        assert torch.equal(gather(lookup, same), gather(lookup.contiguous(), ids))
        assert torch.equal(bucket_sum(pairs, same, 7), bucket_sum(pairs.contiguous(), ids, 7))


def test_bucket_ids_out_of_range_are_ignored():
    wrong = torch.tensor([[-1, 3, 1, 2**31 - 1]], device=DEVICE)
    for ids in (wrong, wrong.int()):
        found = gather(torch.ones(1, 3, device=DEVICE), ids)
        assert found.tolist() == [[0.0, 0.0, 1.0, 0.0]]
        assert bucket_sum(torch.ones(1, 4, device=DEVICE), ids, 3).tolist() == [[0.0, 1.0, 0.0]]


def test_values_that_are_not_finite_stay_in_their_bucket():
    pairs = torch.tensor([[float("inf"), 1.0, float("nan"), 2.0]], device=DEVICE)
    sums = bucket_sum(pairs, torch.tensor([[0, 1, 2, 1]], device=DEVICE), 4)
    expected = torch.tensor([[float("inf"), 3.0, float("nan"), 0.0]], device=DEVICE)
    torch.testing.assert_close(sums, expected, equal_nan=True)
