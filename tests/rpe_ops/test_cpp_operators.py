"""The compiled gather and bucket sum against float64: values, layouts, threads, wrong bucket ids.

test_operators.py has the tests of all implementations. This file tests what is special in this one:
blocks of 8 slices, threads, strides read in place. It also runs on a GPU if the library has CUDA
kernels.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import rpe_ops
from rpe_ops import library
from tests.rpe_ops.extension import provide_library

pytestmark = pytest.mark.usefixtures("poisoned_memory", "operators")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
id_dtypes = pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])


@pytest.fixture(scope="session")
def operators() -> None:
    provide_library()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest, operators: None) -> str:
    if request.param == "cuda" and not library.has_cuda_kernels():
        pytest.skip(library.reason_without_cuda())
    return request.param


def random_ids(l_q: int, l_k: int, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(k, (l_q, l_k), dtype=dtype)


def dense_bucket_sum(pairs: Tensor, ids: Tensor, k: int) -> Tensor:
    one_hot = (ids.long()[..., None] == torch.arange(k, device=ids.device)).double()
    return torch.einsum("...ij,ijk->...ik", pairs.double(), one_hot)


def assert_is_bucket_sum(actual: Tensor, pairs: Tensor, ids: Tensor) -> None:
    """Compare with the dense sum, up to a few roundings of the sum and one of the result."""
    k, dtype = actual.shape[-1], actual.dtype
    expected = dense_bucket_sum(pairs, ids, k)
    sums = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    largest = dense_bucket_sum(pairs.abs(), ids, k)
    allowed = sums * largest + torch.finfo(dtype).eps * expected.abs()
    assert actual.isfinite().all()
    assert ((actual - expected).abs() <= allowed).all()


@dtypes
@id_dtypes
@pytest.mark.parametrize("slices", [1, 2, 4, 5, 8, 9, 19])
def test_every_number_of_slices_equals_the_dense_product(device, dtype, id_dtype, slices):
    ids = random_ids(9, 45, 13, id_dtype).to(device)
    lookup = torch.randn(slices, 9, 13).to(device, dtype)
    pairs = torch.randn(slices, 9, 45).to(device, dtype)
    gathered = library.gather(lookup, ids)
    summed = library.bucket_sum(pairs, ids, 13)
    assert gathered.dtype == summed.dtype == dtype
    assert torch.equal(gathered, lookup.gather(-1, ids.long().expand(slices, 9, 45)))
    assert_is_bucket_sum(summed, pairs, ids)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
        lambda x: x[:1, :, :1, :1].expand_as(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x.repeat_interleave(3, -1)[..., 1::3],
        lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape),
    ],
    ids=["heads-outside", "permuted", "one-value", "one-head", "every-third", "offset"],
)
@pytest.mark.parametrize("batch", [(2, 5), (2, 5, 3)], ids=["four", "five"])
def test_strides_are_read_in_place(device, layout, batch):
    ids = random_ids(7, 11, 6).t().contiguous().t().to(device)
    lookup, pairs = torch.randn(*batch, 7, 6), torch.randn(*batch, 7, 11)
    if len(batch) == 2:
        lookup, pairs = layout(lookup), layout(pairs)
    else:
        lookup, pairs = lookup.transpose(1, 2), pairs.transpose(0, 2)
    lookup, pairs = lookup.to(device), pairs.to(device)
    expected = lookup.gather(-1, ids.expand(*lookup.shape[:-1], 11))
    assert torch.equal(library.gather(lookup, ids), expected)
    assert_is_bucket_sum(library.bucket_sum(pairs, ids, 6), pairs, ids)


@dtypes
def test_gradients_are_the_adjoint_operator(dtype):
    ids = random_ids(20, 31, 8)
    options = {"implementation": "cpp"}
    lookup = torch.randn(2, 3, 20, 8).to(dtype).requires_grad_()
    pairs = torch.randn(2, 3, 20, 31).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(rpe_ops.gather(lookup, ids, **options), lookup, pairs)
    assert_is_bucket_sum(grad, pairs.detach(), ids)
    (grad,) = torch.autograd.grad(rpe_ops.bucket_sum(pairs, ids, 8, **options), pairs, lookup)
    assert torch.equal(grad, lookup.detach().gather(-1, ids.expand(2, 3, 20, 31)))


@dtypes
def test_results_are_the_same_to_the_bit_with_one_thread_and_with_two(threads, dtype):
    # Far more pairs than one thread computes at a time.
    ids = random_ids(197, 197, 50)
    lookup = torch.randn(2, 6, 197, 50).to(dtype)
    pairs = torch.randn(2, 6, 197, 197).to(dtype)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append((library.gather(lookup, ids), library.bucket_sum(pairs, ids, 50)))
    for gathered, summed in results[1:]:
        assert torch.equal(gathered, results[0][0])
        assert torch.equal(summed, results[0][1])
    assert_is_bucket_sum(results[0][1], pairs, ids)


def test_two_sums_with_more_buckets_than_fit_shared_memory_are_the_same_to_the_bit(device):
    ids, pairs = random_ids(197, 197, 700), torch.randn(2, 6, 197, 197)
    ids, pairs = ids.to(device), pairs.to(device)
    first = library.bucket_sum(pairs, ids, 700)
    assert torch.equal(library.bucket_sum(pairs, ids, 700), first)
    assert_is_bucket_sum(first, pairs, ids)


@id_dtypes
@pytest.mark.parametrize("bucket", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("count", [1, 2], ids=["one-thread", "two-threads"])
def test_a_bucket_out_of_range_is_an_index_error_and_the_next_call_works(
    id_dtype, bucket, threads, count
):
    ids = random_ids(300, 64, 5, id_dtype)
    wrong = ids.clone()
    wrong[-1, -1] = bucket
    lookup, pairs = torch.randn(4, 300, 5), torch.randn(4, 300, 64)
    threads(count)
    with pytest.raises(IndexError, match=rf"bucket_ids must be in \[0, 5\), got {bucket}"):
        library.gather(lookup, wrong)
    with pytest.raises(IndexError, match=rf"bucket_ids must be in \[0, 5\), got {bucket}"):
        library.bucket_sum(pairs, wrong, 5)
    assert_is_bucket_sum(library.bucket_sum(pairs, ids, 5), pairs, ids)


@pytest.mark.parametrize("bucket", [2**32, 2**40 + 3, -(2**63)])
def test_a_bucket_beyond_32_bits_is_not_truncated_into_range(bucket):
    wrong = torch.full((2, 3), bucket)
    with pytest.raises(IndexError, match=f"got {bucket}"):
        library.gather(torch.ones(2, 5), wrong)


def test_empty_tensors(device):
    lookup, ids = torch.ones(0, 3, 4, device=device), random_ids(3, 5, 4).to(device)
    assert library.gather(lookup, ids).shape == (0, 3, 5)
    assert library.gather(lookup.new_ones(2, 3, 4), ids[:, :0]).shape == (2, 3, 0)
    assert library.gather(lookup.new_ones(2, 0, 4), ids[:0]).shape == (2, 0, 5)
    assert library.bucket_sum(lookup.new_ones(2, 0, 5), ids[:0], 4).shape == (2, 0, 4)
    no_keys = library.bucket_sum(lookup.new_ones(2, 3, 0), ids[:, :0], 4)
    assert torch.equal(no_keys, torch.zeros_like(no_keys))
    assert no_keys.shape == (2, 3, 4)


def test_a_lookup_without_buckets_is_an_index_error():
    with pytest.raises(IndexError, match=r"must be in \[0, 0\), got 0"):
        library.gather(torch.ones(2, 3, 0), torch.zeros(3, 5, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_sums_do_not_stagnate(device, dtype):
    ones = torch.ones(3, 1, 4096, dtype=dtype, device=device)
    ids = torch.zeros(1, 4096, dtype=torch.int32, device=device)
    assert library.bucket_sum(ones, ids, 2).tolist() == [[[4096.0, 0.0]]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4).int(), random_ids(3, 4, 2), 2), "pairs must be a tensor of float16"),
        ((torch.ones(3, 4), random_ids(3, 4, 2).short(), 2), "bucket_ids must be int32 or int64"),
        ((torch.ones(3, 4), random_ids(2, 4, 2), 2), "L_q = 3"),
        (
            (torch.ones(3, 4), random_ids(3, 5, 2), 2),
            "bucket_ids must have as many keys as pairs, 4, got 5",
        ),
        (
            (torch.ones(3, 4), random_ids(3, 4, 2), 0),
            r"num_buckets must be in \[1, 1048576\], got 0",
        ),
    ],
    ids=["integers", "int16", "queries", "keys", "no-buckets"],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        library.bucket_sum(*arguments)
