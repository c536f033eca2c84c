"""The compiled gather and bucket sum against float64: values, layouts, threads, wrong buckets.

What holds for every implementation is in test_operators.py; here are the turns of this one: blocks
of 8 slices, threads, strides read in place. Runs on a GPU too where the library has CUDA kernels.
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
index_dtypes = pytest.mark.parametrize(
    "index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"]
)


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


def random_index(l_q: int, l_k: int, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(k, (l_q, l_k), dtype=dtype)


def dense_bucket_sum(pairs: Tensor, index: Tensor, k: int) -> Tensor:
    one_hot = (index.long()[..., None] == torch.arange(k, device=index.device)).double()
    return torch.einsum("...ij,ijk->...ik", pairs.double(), one_hot)


def assert_is_bucket_sum(actual: Tensor, pairs: Tensor, index: Tensor) -> None:
    """`actual` is the dense sum up to a few roundings of the sum and one to its own dtype."""
    k, dtype = actual.shape[-1], actual.dtype
    expected = dense_bucket_sum(pairs, index, k)
    sums = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    largest = dense_bucket_sum(pairs.abs(), index, k)
    allowed = sums * largest + torch.finfo(dtype).eps * expected.abs()
    assert actual.isfinite().all()
    assert ((actual - expected).abs() <= allowed).all()


@dtypes
@index_dtypes
@pytest.mark.parametrize("slices", [1, 2, 4, 5, 8, 9, 19])
def test_every_number_of_slices_equals_the_dense_product(device, dtype, index_dtype, slices):
    index = random_index(9, 45, 13, index_dtype).to(device)
    lookup = torch.randn(slices, 9, 13).to(device, dtype)
    pairs = torch.randn(slices, 9, 45).to(device, dtype)
    gathered = library.gather(lookup, index)
    summed = library.bucket_sum(pairs, index, 13)
    assert gathered.dtype == summed.dtype == dtype
    assert torch.equal(gathered, lookup.gather(-1, index.long().expand(slices, 9, 45)))
    assert_is_bucket_sum(summed, pairs, index)


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
    index = random_index(7, 11, 6).t().contiguous().t().to(device)
    lookup, pairs = torch.randn(*batch, 7, 6), torch.randn(*batch, 7, 11)
    if len(batch) == 2:
        lookup, pairs = layout(lookup), layout(pairs)
    else:
        lookup, pairs = lookup.transpose(1, 2), pairs.transpose(0, 2)
    lookup, pairs = lookup.to(device), pairs.to(device)
    expected = lookup.gather(-1, index.expand(*lookup.shape[:-1], 11))
    assert torch.equal(library.gather(lookup, index), expected)
    assert_is_bucket_sum(library.bucket_sum(pairs, index, 6), pairs, index)


@dtypes
def test_gradients_are_the_adjoint_operator(dtype):
    index = random_index(20, 31, 8)
    options = {"implementation": "cpp"}
    lookup = torch.randn(2, 3, 20, 8).to(dtype).requires_grad_()
    pairs = torch.randn(2, 3, 20, 31).to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(rpe_ops.gather(lookup, index, **options), lookup, pairs)
    assert_is_bucket_sum(grad, pairs.detach(), index)
    (grad,) = torch.autograd.grad(rpe_ops.bucket_sum(pairs, index, 8, **options), pairs, lookup)
    assert torch.equal(grad, lookup.detach().gather(-1, index.expand(2, 3, 20, 31)))


@dtypes
def test_results_are_the_same_to_the_bit_with_one_thread_and_with_two(threads, dtype):
    # Far more pairs than one thread takes at a time.
    index = random_index(197, 197, 50)
    lookup = torch.randn(2, 6, 197, 50).to(dtype)
    pairs = torch.randn(2, 6, 197, 197).to(dtype)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append((library.gather(lookup, index), library.bucket_sum(pairs, index, 50)))
    for gathered, summed in results[1:]:
        assert torch.equal(gathered, results[0][0])
        assert torch.equal(summed, results[0][1])
    assert_is_bucket_sum(results[0][1], pairs, index)


def test_two_sums_over_more_buckets_than_fit_at_once_are_the_same_to_the_bit(device):
    index, pairs = random_index(197, 197, 700), torch.randn(2, 6, 197, 197)
    index, pairs = index.to(device), pairs.to(device)
    first = library.bucket_sum(pairs, index, 700)
    assert torch.equal(library.bucket_sum(pairs, index, 700), first)
    assert_is_bucket_sum(first, pairs, index)


@index_dtypes
@pytest.mark.parametrize("bucket", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("count", [1, 2], ids=["one-thread", "two-threads"])
def test_a_bucket_out_of_range_is_an_index_error_and_the_next_call_works(
    index_dtype, bucket, threads, count
):
    index = random_index(300, 64, 5, index_dtype)
    wrong = index.clone()
    wrong[-1, -1] = bucket
    lookup, pairs = torch.randn(4, 300, 5), torch.randn(4, 300, 64)
    threads(count)
    with pytest.raises(IndexError, match=f"index holds bucket {bucket}, allowed are 0 to 4"):
        library.gather(lookup, wrong)
    with pytest.raises(IndexError, match=f"index holds bucket {bucket}, allowed are 0 to 4"):
        library.bucket_sum(pairs, wrong, 5)
    assert_is_bucket_sum(library.bucket_sum(pairs, index, 5), pairs, index)


@pytest.mark.parametrize("bucket", [2**32, 2**40 + 3, -(2**63)])
def test_a_bucket_beyond_32_bits_is_not_truncated_into_range(bucket):
    wrong = torch.full((2, 3), bucket)
    with pytest.raises(IndexError, match=f"bucket {bucket},"):
        library.gather(torch.ones(2, 5), wrong)


def test_empty_tensors(device):
    lookup, index = torch.ones(0, 3, 4, device=device), random_index(3, 5, 4).to(device)
    assert library.gather(lookup, index).shape == (0, 3, 5)
    assert library.gather(lookup.new_ones(2, 3, 4), index[:, :0]).shape == (2, 3, 0)
    assert library.gather(lookup.new_ones(2, 0, 4), index[:0]).shape == (2, 0, 5)
    assert library.bucket_sum(lookup.new_ones(2, 0, 5), index[:0], 4).shape == (2, 0, 4)
    no_keys = library.bucket_sum(lookup.new_ones(2, 3, 0), index[:, :0], 4)
    assert torch.equal(no_keys, torch.zeros_like(no_keys))
    assert no_keys.shape == (2, 3, 4)


def test_a_lookup_without_buckets_has_no_value_to_read():
    with pytest.raises(IndexError, match="allowed are 0 to -1"):
        library.gather(torch.ones(2, 3, 0), torch.zeros(3, 5, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_sums_do_not_stagnate(device, dtype):
    ones = torch.ones(3, 1, 4096, dtype=dtype, device=device)
    index = torch.zeros(1, 4096, dtype=torch.int32, device=device)
    assert library.bucket_sum(ones, index, 2).tolist() == [[[4096.0, 0.0]]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 4).int(), random_index(3, 4, 2), 2), "pairs must be a floating-point"),
        ((torch.ones(3, 4), random_index(3, 4, 2).short(), 2), "index must be int32 or int64"),
        ((torch.ones(3, 4), random_index(2, 4, 2), 2), "L_q = 3"),
        ((torch.ones(3, 4), random_index(3, 5, 2), 2), "index has 5 keys, pairs has 4"),
        ((torch.ones(3, 4), random_index(3, 4, 2), 0), "num_buckets must be at least 1"),
    ],
    ids=["integers", "int16", "queries", "keys", "no-buckets"],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        library.bucket_sum(*arguments)
