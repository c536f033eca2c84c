"""Triton's fused attention against the float64 oracle; on the CPU in Triton's interpreter.

Every case compares out, sums, lse and all gradients, on memory that is NaN before it is written.
"""

import pytest
import torch

pytest.importorskip("triton")
import rpe_ops
from irpe_core import RPEConfig, build_rpe, rpe_attention, set_implementation
from irpe_core.buckets import grid_buckets
from rpe_ops import triton_kernels
from rpe_ops.triton_kernels import attention, flat_backward, flat_forward, flat_tiles
from tests.rpe_ops.attention_cases import DEVICE, GRIDS, SETTINGS, Case, Problem, check
from tests.rpe_ops.attention_oracle import Results

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter warns about the logarithm of 0 for a query without any key.
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16

# Sizes are small because the interpreter is slow.
CASES = {
    "product-k-5x5": Case(grid=(5, 5), skip=1),
    "product-q": Case(rpe_on="q", skip=2, batch=2, heads=3),
    "product-v": Case(rpe_on="v", skip=1),
    "product-qkv-7x9": Case(rpe_on="qkv", grid=(7, 9), skip=1, dim=24),
    "product-k-14x14": Case(grid=(14, 14), skip=1, dtype=BFLOAT16, dim=64),
    "product-qkv-bfloat16": Case(
        rpe_on="qkv", skip=1, dtype=BFLOAT16, padding=True, dropout_p=0.1, batch=2
    ),
    "product-qkv-float16": Case(rpe_on="qkv", grid=(4, 3), dtype=FLOAT16, dropout_p=0.1, dim=32),
    "product-bias-qk": Case(rpe_on="qk", skip=1, bias=True),
    "product-bias-of-heads": Case(rpe_on="qk", bias=True, shared=False, batch=2, heads=2),
    "product-qkv-of-heads": Case(rpe_on="qkv", skip=1, shared=False, batch=2, heads=2),
    "euc-qkv": Case("euc", "qkv", skip=2, padding=True, dropout_p=0.1, batch=2),
    "euc-k-float16": Case("euc", dtype=FLOAT16, skip=1),
    "euc-qkv-1x17": Case("euc", "qkv", (1, 17), 1),
    "quant-kv": Case("quant", "kv", skip=1),
    "quant-q-bfloat16": Case("quant", "q", (4, 3), dtype=BFLOAT16, dropout_p=0.1),
    "cross-qkv": Case("cross", "qkv", skip=1, padding=True, dropout_p=0.1, batch=2),
    "cross-qkv-5x5": Case("cross", "qkv", (5, 5)),
    "cross-bias-k-bfloat16": Case("cross", "k", skip=2, dtype=BFLOAT16, bias=True),
    "one-token": Case(rpe_on="qkv", grid=(1, 1)),
    "one-token-and-two": Case("cross", "qkv", (1, 1), 2),
    "row-of-17": Case(rpe_on="qkv", grid=(1, 17), skip=1, dropout_p=0.1),
    "column-of-17": Case(rpe_on="k", grid=(17, 1)),
    "row-of-33": Case("cross", "kv", (2, 33), dtype=FLOAT16, padding=True),
    "more-skipped-than-columns": Case(rpe_on="qkv", grid=(2, 2), skip=19),
    "no-encoding": Case(rpe_on="", skip=1, padding=True, batch=2),
}


# The variant "flat_wide" has the kernels of "flat"; it has a test of its own.
FAMILIES = ("flat", "rows")


@pytest.fixture(params=FAMILIES)
def kernels(request):
    """Kernels of each family."""
    return triton_kernels.variant(request.param)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_and_gradients_follow_the_equations(case, kernels):
    problem = Problem(case, kernels)
    check(problem.by_kernels(), problem.by_oracle(), case.dtype, rounds_lookups=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("method", ["product", "euc", "quant", "cross"])
def test_every_combination_follows_the_equations(method, grid, dtype, family):
    for setting in SETTINGS:
        case = setting._replace(method=method, grid=grid, dtype=dtype)
        problem = Problem(case, triton_kernels.variant(family))
        check(problem.by_kernels(), problem.by_oracle(), dtype, rounds_lookups=True)


def test_a_negative_scale_follows_the_equations(kernels):
    problem = Problem(Case(rpe_on="qkv", grid=(2, 3), skip=1), kernels)
    problem.scale = -0.5
    check(problem.by_kernels(), problem.by_oracle(), FLOAT32)


def test_wide_tiles_follow_the_equations():
    case = Case(rpe_on="qkv", grid=(10, 13), skip=1, dtype=BFLOAT16, padding=True, dropout_p=0.1)
    problem = Problem(case, triton_kernels.variant("flat_wide"))
    own = [flat_tiles.choose_flat_tiles(problem.q, 3, backward=False, wide=w).own for w in (0, 1)]
    assert own == [64, 128]
    check(problem.by_kernels(), problem.by_oracle(), BFLOAT16, rounds_lookups=True)


def test_temporary_pairs_in_several_passes_change_nothing(monkeypatch):
    case = Case(rpe_on="qkv", grid=(3, 4), skip=1, dtype=BFLOAT16, batch=2, heads=3, dropout_p=0.1)
    problem = Problem(case, triton_kernels.variant("flat"))
    assert flat_tiles.heads_per_pass(problem.q, copies=2) == 6
    expected = problem.by_kernels()
    monkeypatch.setattr(flat_tiles, "_MIN_HEADS", 1)
    # Two rows of 16 elements in 16 bits, for each of 13 tokens and each of 4 heads.
    monkeypatch.setattr(flat_tiles, "_MAX_PAIRS_BYTES", 4 * 2 * 13 * 16 * 2)
    # Two equal passes rather than one of 4 heads and one of 2.
    assert flat_tiles.heads_per_pass(problem.q, copies=2) == 3
    monkeypatch.setattr(flat_tiles, "_MAX_PAIRS_BYTES", 2 * 13 * 16 * 2)
    assert flat_tiles.heads_per_pass(problem.q, copies=1) == 2
    assert flat_tiles.heads_per_pass(problem.q, copies=2) == 1
    for x, y in zip(problem.by_kernels(), expected, strict=True):
        assert torch.equal(x, y)


def test_launches_are_prepared_once_per_kind():
    def misses():
        return [module._plan.cache_info().misses for module in (flat_forward, flat_backward)]

    problem = Problem(
        CASES["product-qkv-float16"]._replace(grid=(2, 2)), triton_kernels.variant("flat")
    )
    expected, prepared = problem.by_kernels(), misses()
    assert all(map(torch.equal, problem.by_kernels(), expected))
    assert misses() == prepared
    # Other strides are another kind.
    problem.q = problem.q.contiguous()
    assert all(map(torch.equal, problem.by_kernels(), expected))
    assert misses() == [count + 1 for count in prepared]


def test_small_grids_use_flat_tiles_and_large_ones_do_not():
    def family(height, width, dim=64, dtype=BFLOAT16):
        buckets = grid_buckets(RPEConfig(), height, width, "meta")
        q = torch.empty(1, 1, buckets.num_tokens, dim, dtype=dtype, device="meta")
        return attention.choose_family(q, buckets)

    assert [family(14, 14), family(25, 42), family(50, 84)] == ["flat", "flat", "rows"]
    assert [family(14, 14, dim, FLOAT32) for dim in (64, 65)] == ["flat", "rows"]


def test_queries_without_any_key_yield_zeros(kernels):
    problem = Problem(CASES["cross-qkv"]._replace(grid=(2, 2)), kernels)
    found = problem.by_kernels()
    assert torch.isneginf(found.lse[1]).all()
    for name, x in zip(Results._fields, found, strict=True):
        of_images = name in ("out", "sums", "grad_q", "grad_k", "grad_v")
        assert not of_images or not x[1].any(), name


def test_two_runs_are_equal_in_every_bit(kernels):
    problem = Problem(CASES["product-qkv-bfloat16"]._replace(grid=(2, 3), batch=1), kernels)
    for x, y in zip(problem.by_kernels(), problem.by_kernels(), strict=True):
        assert torch.equal(x, y)


def test_inputs_and_gradients_of_any_strides(kernels):
    problem = Problem(Case(rpe_on="kv", grid=(2, 3), heads=2), kernels)
    # First strided in the last dimension, then with gaps in memory.
    for name in ("q", "v", "table_k", "table_v"):
        x = getattr(problem, name)
        setattr(problem, name, x.transpose(-1, -2).contiguous().transpose(-1, -2))
    problem.k = problem.k.repeat_interleave(2, -1)[..., ::2]
    # The gradient of a plain sum has strides of 0.
    problem.grad_out = torch.ones((), device=DEVICE).expand(problem.q.shape)
    check(problem.by_kernels(), problem.by_oracle(), FLOAT32)


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        (torch.float64, 16, "float32 for Triton's attention, got torch.float64"),
        (FLOAT32, 144, "at most 128 for Triton's attention, got 144"),
    ],
)
def test_unsupported_inputs_are_an_error_and_composed_by_rpe_attention(dtype, dim, message):
    config = RPEConfig(skip=1)
    module = build_rpe(config, dim, 1)[1].to(DEVICE, dtype)
    torch.nn.init.normal_(module.lookup_table_weight)
    q = torch.randn(1, 1, 5, dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        rpe_ops.attention(q, q, q, grid_buckets(config, 2, 2, DEVICE), implementation="triton")
    set_implementation(module, "reference", DEVICE)
    expected = rpe_attention(q, q, q, rpe_k=module)
    set_implementation(module, "triton", DEVICE)
    torch.testing.assert_close(rpe_attention(q, q, q, rpe_k=module), expected)


def test_another_seed_draws_another_mask(kernels):
    problem = Problem(Case(grid=(2, 2), dropout_p=0.5), kernels)
    first = problem.by_kernels().out
    problem.seed = problem.seed + 2**40
    assert not torch.equal(problem.by_kernels().out, first)
