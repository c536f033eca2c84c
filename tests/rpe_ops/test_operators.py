"""Gather and bucket sum against a dense one-hot oracle, their derivatives and their tracing."""

import pytest
import torch
from torch import Tensor

import rpe_ops
from rpe_ops import ops
from tests.rpe_ops.extension import provide_library

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# L_q, L_k, K
SIZES = {
    "197": (197, 197, 50),
    "63": (63, 63, 49),
    "5x9": (45, 45, 82),
    "one": (1, 1, 1),
    "wide": (7, 33, 13),
    "tall": (33, 7, 3),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "last-two-swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads-inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1].expand_as(x),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(params=["reference", "cpp"])
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp":
        provide_library()
    return request.param


def random_ids(l_q: int, l_k: int, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(k, (l_q, l_k), generator=torch.Generator().manual_seed(1), dtype=dtype)


def random_values(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return values.to(dtype)


def one_hot(ids: Tensor, k: int) -> Tensor:
    return (ids.long()[..., None] == torch.arange(k)).double()


def dense_gather(lookup: Tensor, ids: Tensor) -> Tensor:
    return torch.einsum("bhik,ijk->bhij", lookup.double(), one_hot(ids, lookup.shape[-1]))


def dense_bucket_sum(pairs: Tensor, ids: Tensor, k: int) -> Tensor:
    return torch.einsum("bhij,ijk->bhik", pairs.double(), one_hot(ids, k))


def assert_is_bucket_sum(actual: Tensor, pairs: Tensor, ids: Tensor) -> None:
    """Compare with the dense sum, up to a few float32 roundings and one to the result's dtype."""
    k, dtype = actual.shape[-1], actual.dtype
    expected = dense_bucket_sum(pairs, ids, k)
    sums = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    allowed = sums * dense_bucket_sum(pairs.abs(), ids, k) + torch.finfo(dtype).eps * expected.abs()
    assert actual.isfinite().all()
    assert ((actual - expected).abs() <= allowed).all()


@sizes
@dtypes
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_gather_picks_exactly_the_value_of_the_bucket(implementation, size, dtype, id_dtype):
    l_q, l_k, k = size
    ids = random_ids(l_q, l_k, k, id_dtype)
    lookup = random_values(2, 3, l_q, k, dtype=dtype).requires_grad_()
    cotangent = random_values(2, 3, l_q, l_k, dtype=dtype)
    out = rpe_ops.gather(lookup, ids, implementation=implementation)
    (grad,) = torch.autograd.grad(out, lookup, cotangent)
    assert out.dtype == grad.dtype == dtype
    assert torch.equal(out.double(), dense_gather(lookup, ids))
    assert_is_bucket_sum(grad, cotangent, ids)


@sizes
@dtypes
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_bucket_sum_equals_the_dense_product(implementation, size, dtype, id_dtype):
    l_q, l_k, k = size
    ids = random_ids(l_q, l_k, k, id_dtype)
    pairs = random_values(2, 3, l_q, l_k, dtype=dtype).requires_grad_()
    cotangent = random_values(2, 3, l_q, k, dtype=dtype)
    out = rpe_ops.bucket_sum(pairs, ids, k, implementation=implementation)
    (grad,) = torch.autograd.grad(out, pairs, cotangent)
    assert out.dtype == grad.dtype == dtype
    assert_is_bucket_sum(out, pairs, ids)
    assert torch.equal(grad.double(), dense_gather(cotangent, ids))


@layouts
@pytest.mark.parametrize("ids_layout", ["contiguous", "transposed", "strided"])
def test_every_layout_gives_the_same_numbers(implementation, layout, ids_layout):
    ids = random_ids(9, 7, 5)
    if ids_layout == "transposed":
        ids = ids.t().contiguous().t()
    elif ids_layout == "strided":
        ids = ids.repeat_interleave(3, 1)[:, ::3]
    lookup, pairs = layout(random_values(2, 3, 9, 5)), layout(random_values(2, 3, 9, 7))
    gathered = rpe_ops.gather(lookup, ids, implementation=implementation)
    assert torch.equal(gathered, dense_gather(lookup, ids))
    summed = rpe_ops.bucket_sum(pairs, ids, 5, implementation=implementation)
    torch.testing.assert_close(summed, dense_bucket_sum(pairs, ids, 5))


@pytest.mark.parametrize("batch", [(), (4,), (2, 3, 2)], ids=["none", "one", "three"])
def test_any_number_of_batch_dimensions(implementation, batch):
    ids = random_ids(5, 6, 4)
    lookup, pairs = random_values(*batch, 5, 4), random_values(*batch, 5, 6)
    gathered = rpe_ops.gather(lookup, ids, implementation=implementation)
    summed = rpe_ops.bucket_sum(pairs, ids, 4, implementation=implementation)
    flat = dense_gather(lookup.reshape(1, -1, 5, 4), ids).reshape(*batch, 5, 6)
    assert torch.equal(gathered, flat)
    flat = dense_bucket_sum(pairs.reshape(1, -1, 5, 6), ids, 4).reshape(*batch, 5, 4)
    torch.testing.assert_close(summed, flat)


def test_empty_batches_and_no_keys_give_empty_results_and_zero_sums(implementation):
    options = {"implementation": implementation}
    assert rpe_ops.gather(torch.ones(0, 3, 4), random_ids(3, 5, 4), **options).shape == (0, 3, 5)
    no_keys = torch.empty(3, 0, dtype=torch.int64)
    assert rpe_ops.gather(torch.ones(2, 3, 4), no_keys, **options).shape == (2, 3, 0)
    assert torch.equal(
        rpe_ops.bucket_sum(torch.ones(2, 3, 0), no_keys, 4, **options), torch.zeros(2, 3, 4)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_sums_do_not_stagnate(implementation, dtype):
    # Adding ones in bfloat16 itself stops at 256, in float16 at 2048.
    ones, ids = torch.ones(1, 1, 1, 4096, dtype=dtype), torch.zeros(1, 4096, dtype=torch.int64)
    assert rpe_ops.bucket_sum(ones, ids, 2, implementation=implementation).tolist() == [
        [[[4096.0, 0.0]]]
    ]


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives_of_first_and_second_order(implementation, check):
    ids = random_ids(3, 4, 5)
    lookup = random_values(2, 1, 3, 5).requires_grad_()
    pairs = random_values(2, 1, 3, 4).requires_grad_()
    assert check(lambda x: rpe_ops.gather(x, ids, implementation=implementation), lookup)
    assert check(lambda x: rpe_ops.bucket_sum(x, ids, 5, implementation=implementation), pairs)


@dtypes
def test_opcheck(implementation, dtype):
    ids = random_ids(5, 7, 4, torch.int32)
    lookup = random_values(2, 3, 5, 4, dtype=dtype).requires_grad_()
    pairs = random_values(2, 3, 5, 7, dtype=dtype).transpose(0, 1).requires_grad_()
    torch.library.opcheck(ops.gather, (lookup, ids, implementation))
    torch.library.opcheck(ops.bucket_sum, (pairs, ids, 4, implementation))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(dynamic):
    def both(lookup: Tensor, ids: Tensor) -> Tensor:
        return rpe_ops.bucket_sum(rpe_ops.gather(lookup, ids), ids, lookup.shape[-1])

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for l_q, l_k, k in SIZES.values():
        ids = random_ids(l_q, l_k, k)
        eager, traced = (random_values(2, 3, l_q, k).requires_grad_() for _ in range(2))
        expected, actual = both(eager, ids), compiled(traced, ids)
        expected.square().sum().backward()
        actual.square().sum().backward()
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(traced.grad, eager.grad)
