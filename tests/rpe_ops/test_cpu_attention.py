"""Fused attention on the CPU, reference and C++, against the float64 oracle.

All combinations, outputs and gradients are compared, on memory that is NaN before it is written.
"""

import pytest
import torch

from rpe_ops import library, reference
from tests.rpe_ops.attention_cases import GRIDS, SETTINGS, Case, Problem, check
from tests.rpe_ops.attention_oracle import Results
from tests.rpe_ops.extension import provide_library

pytestmark = pytest.mark.usefixtures("poisoned_memory", "compiled")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def compiled() -> None:
    provide_library()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("method", ["product", "euc", "quant", "cross"])
def test_attention_and_gradients_follow_the_equations(method, grid, dtype):
    for setting in SETTINGS:
        case = setting._replace(method=method, grid=grid, dtype=dtype)
        problem = Problem(case, library, "cpu")
        expected = problem.by_oracle()
        check(problem.by_kernels(), expected, dtype)
        problem.kernels = reference
        check(problem.by_kernels(), expected, dtype)


@pytest.mark.parametrize("grid", [(14, 14), (14, 20)], ids=["14x14", "several tiles"])
@pytest.mark.parametrize("method", ["product", "euc", "quant", "cross"])
def test_larger_grids(method, grid):
    case = Case(method, "qkv", grid, skip=1, padding=True, dropout_p=0.1, batch=2)
    problem = Problem(case, library, "cpu")
    check(problem.by_kernels(), problem.by_oracle(), torch.float32)


def test_a_feature_map_of_detr():
    problem = Problem(Case(rpe_on="qkv", grid=(25, 42), dim=32), library, "cpu")
    # The oracle would run for a minute. The reference passes the tests above and replaces it.
    expected = problem.widened(reference).by_kernels()
    check(problem.by_kernels(), expected, torch.float32)


def test_inputs_and_gradients_of_any_strides():
    problem = Problem(Case(rpe_on="kv", grid=(2, 3), heads=2), library, "cpu")
    for name in ("q", "v", "table_k", "table_v"):
        x = getattr(problem, name)
        setattr(problem, name, x.transpose(-1, -2).contiguous().transpose(-1, -2))
    problem.k = problem.k.repeat_interleave(2, -1)[..., ::2]
    # The gradient of a plain sum has strides of 0.
    problem.grad_out = torch.ones(()).expand(problem.q.shape)
    check(problem.by_kernels(), problem.by_oracle(), torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        Case("cross", "qkv", (14, 20), 1, dropout_p=0.1, batch=2, heads=3),
        Case("product", "qkv", (14, 20), 1, shared=False, padding=True, batch=2, heads=3),
        Case("product", "qk", (14, 20), bias=True, shared=False, batch=2, heads=3),
        Case("product", "qk", (14, 20), bias=True, padding=True, batch=2, heads=3),
    ],
    ids=["cross", "tables of heads", "biases of heads", "bias"],
)
def test_runs_and_numbers_of_threads_are_equal_in_every_bit(case):
    problem = Problem(case, library, "cpu")
    first = problem.by_kernels()
    torch.set_num_threads(3)
    try:
        second = problem.by_kernels()
    finally:
        torch.set_num_threads(1)
    for name, x, y in zip(Results._fields, first, second, strict=True):
        assert x is y or torch.equal(x, y), name
    check(first, problem.widened(reference).by_kernels(), torch.float32)


def test_axis_offsets_with_a_bucket_out_of_range_are_an_index_error():
    problem = Problem(Case(grid=(3, 4)), library, "cpu")
    problem.buckets.local[0, 0, 2] = 1000
    with pytest.raises(IndexError, match=r"row_base \+ local must be in"):
        problem.by_kernels()
