"""rpe_attention against the equations in float64: combinations, masks, dropout, precision."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_core import METHODS, RPEConfig, build_rpe, rpe_attention, set_implementation
from rpe_ops.dropout import keep_mask
from tests.irpe_core import naive
from tests.irpe_core.largest_tensor import LargestTensor
from tests.recipes import fill

# Without Triton, whose attention does not support float64.
pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize("implementation", ["reference", "cpp"], indirect=True),
]

BATCH, HEADS, DIM = 2, 3, 5
ENCODINGS = [("ctx", on) for on in ("q", "k", "v", "qk", "kv", "qkv")]
ENCODINGS += [("bias", on) for on in ("q", "k", "qk")]
# Skipped tokens and grid.
LAYOUTS = {"0-3x5": (0, (3, 5)), "1-5x2": (1, (5, 2)), "2-1x7": (2, (1, 7))}
encodings = pytest.mark.parametrize(
    ("mode", "rpe_on"), ENCODINGS, ids=[f"{mode}-{on}" for mode, on in ENCODINGS]
)
MASKS = ["bool-keys", "bool-pairs", "float-pairs", "float-heads", "bool-nowhere", "float-nowhere"]


def tokens(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Make queries, keys and values; as parts of a joint projection they are not contiguous."""
    joint = torch.randn(BATCH, length, 3, HEADS, DIM, dtype=torch.float64).to(dtype)
    return [x.detach().requires_grad_() for x in joint.permute(2, 0, 3, 1, 4).unbind(0)]


def encoders(config: RPEConfig, dtype: torch.dtype = torch.float64) -> list:
    """Build encodings with random tables."""
    modules = [m and m.to(dtype) for m in build_rpe(config, DIM, HEADS)]
    for parameter in parameters_of(modules):
        torch.nn.init.normal_(parameter)
    return modules


def parameters_of(modules: list) -> list[Tensor]:
    return [p for m in modules if m is not None for p in m.parameters()]


def make_mask(kind: str, length: int) -> Tensor:
    """Make a mask; with `nowhere` some queries may not attend to any key."""
    allowed = torch.rand(BATCH, 1, length, length) < 0.7
    allowed |= torch.eye(length, dtype=torch.bool)
    if kind == "bool-keys":
        allowed = torch.rand(BATCH, 1, 1, length) < 0.7
        allowed[..., 0] = True
    if kind.endswith("nowhere"):
        allowed[:, :, 1::3] = False
    if kind.startswith("bool"):
        return allowed
    heads = HEADS if kind == "float-heads" else 1
    added = torch.randn(BATCH, heads, length, length, dtype=torch.float64)
    return added.masked_fill(~allowed, -torch.inf)


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a fixed weighted sum of `out`."""
    weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    return torch.autograd.grad((out.double() * weights).sum(), inputs)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-head"])
@pytest.mark.parametrize("method", METHODS)
@encodings
def test_values_and_all_gradients_equal_the_equations(method, mode, rpe_on, shared, layout):
    skip, grid = layout
    config = RPEConfig(1.3, method, mode, shared, skip, rpe_on)
    modules, qkv = encoders(config), tokens(skip + grid[0] * grid[1])
    inputs = qkv + parameters_of(modules)
    out = rpe_attention(*qkv, *modules, height=grid[0], width=grid[1])
    expected = naive.attention(*qkv, *modules, config, grid)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for actual, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        evaluated = rpe_attention(*qkv, *modules, height=grid[0], width=grid[1])
    torch.testing.assert_close(evaluated, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "other",
    [RPEConfig(1.3, "quant", rpe_on="v"), RPEConfig(1.4, "euc", rpe_on="v")],
    ids=["method", "ratio"],
)
def test_encodings_with_different_buckets_are_not_fused(other):
    # The number of buckets is the same, so a wrong use of the buckets would raise no error.
    first = RPEConfig(1.3, "euc", rpe_on="k")
    assert first.num_buckets == other.num_buckets
    rpe_k, rpe_v = encoders(first)[1], encoders(other)[2]
    q, k, v = tokens(16)
    out = rpe_attention(q, k, v, None, rpe_k, rpe_v)
    scaled = q * q.shape[-1] ** -0.5
    attn = (scaled @ k.transpose(-2, -1) + rpe_k(scaled)).softmax(-1)
    torch.testing.assert_close(out, attn @ v + rpe_v(attn))


@pytest.mark.parametrize("kind", MASKS)
@encodings
def test_masks_apply_after_the_encodings(mode, rpe_on, kind):
    config = RPEConfig(1.9, "product", mode, False, 1, rpe_on)
    modules, qkv = encoders(config), tokens(16)
    mask = make_mask(kind, 16)
    inputs = qkv + parameters_of(modules)
    arguments = {"height": 5, "width": 3, "attn_mask": mask}
    out = rpe_attention(*qkv, *modules, **arguments)
    expected = naive.attention(*qkv, *modules, config, (5, 3), attn_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for actual, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    if kind.endswith("nowhere"):
        assert not out[:, :, 1::3].any()
    with torch.no_grad():
        evaluated = rpe_attention(*qkv, *modules, **arguments)
    torch.testing.assert_close(evaluated, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [None, *MASKS])
@encodings
def test_with_zero_tables_it_equals_torchs_attention(mode, rpe_on, kind):
    modules = [m and m.double() for m in build_rpe(RPEConfig(mode=mode, rpe_on=rpe_on), DIM, HEADS)]
    qkv, mask = tokens(9), None if kind is None else make_mask(kind, 9)
    out = rpe_attention(*qkv, *modules, attn_mask=mask)
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    for actual, wanted in zip(gradients(out, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("kind", [None, "bool-keys", "float-heads"])
@pytest.mark.parametrize("dim", [2, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_encodings_it_is_bit_identical_to_torchs_attention(dtype, dim, kind):
    q, k, v = (torch.randn(BATCH, HEADS, 9, dim, dtype=dtype) for _ in range(3))
    mask = None if kind is None else make_mask(kind, 9)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    for options in ({}, {"scale": 0.3}, {"dropout_p": 0.4}):
        torch.manual_seed(1)
        out = rpe_attention(q, k, v, attn_mask=mask, **options)
        torch.manual_seed(1)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
    # Without encodings, queries and keys may differ in number.
    assert rpe_attention(q[:, :, :4], k, v).shape == (BATCH, HEADS, 4, dim)


@encodings
def test_dropout_acts_on_the_attention_weights_of_values_and_encoding(mode, rpe_on, implementation):
    config = RPEConfig(mode=mode, rpe_on=rpe_on)
    modules, qkv = encoders(config), tokens(9)
    inputs = qkv + parameters_of(modules)
    torch.manual_seed(3)
    out = rpe_attention(*qkv, *modules, dropout_p=0.4)
    torch.manual_seed(3)
    if implementation == "reference":
        kept = F.dropout(torch.ones(BATCH, HEADS, 9, 9, dtype=torch.float64), 0.4)
    else:
        seed = torch.zeros(1, dtype=torch.int64).random_()
        kept = keep_mask(seed, BATCH, HEADS, 9, 9, 0.4).double() / 0.6
    assert 0 < (kept == 0).sum() < kept.numel()
    expected = naive.attention(*qkv, *modules, config, (3, 3), dropout_mask=kept)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for actual, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rpe_on", ["k", "q", "qkv"])
def test_the_scale_applies_to_the_encodings(rpe_on):
    config = RPEConfig(rpe_on=rpe_on)
    modules, qkv = encoders(config), tokens(9)
    out = rpe_attention(*qkv, *modules, scale=0.3)
    expected = naive.attention(*qkv, *modules, config, (3, 3), scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rpe_on", ["k", "qkv"])
def test_errors_in_lower_precision_are_within_its_rounding(dtype, rpe_on):
    config = RPEConfig(rpe_on=rpe_on, skip=1)
    modules, qkv = encoders(config, dtype), tokens(46, dtype)
    inputs = qkv + parameters_of(modules)
    out = rpe_attention(*qkv, *modules, height=5, width=9)
    expected = naive.attention(*qkv, *modules, config, (5, 9))
    assert out.dtype == dtype
    pairs = [
        (out, expected),
        *zip(gradients(out, inputs), gradients(expected, inputs), strict=True),
    ]
    for actual, wanted in pairs:
        error = (actual.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        assert error < 8 * torch.finfo(dtype).eps


@encodings
def test_autocast_gives_low_precision_outputs_and_full_precision_gradients(mode, rpe_on):
    config = RPEConfig(mode=mode, rpe_on=rpe_on)
    modules, qkv = encoders(config, torch.float32), tokens(9, torch.float32)
    inputs = qkv + parameters_of(modules)
    for mask in (None, make_mask("bool-nowhere", 9)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = rpe_attention(*qkv, *modules, attn_mask=mask)
        expected = naive.attention(*qkv, *modules, config, (3, 3), attn_mask=mask)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.08)
        for gradient, like in zip(gradients(out, inputs), inputs, strict=True):
            assert gradient.dtype == like.dtype
            assert gradient.isfinite().all()


@pytest.mark.parametrize("rpe_on", ["k", "v", "qkv"])
def test_no_tensor_of_size_l_l_d_is_built_in_either_pass(rpe_on):
    batch, heads, length, dim = 2, 2, 64, 48
    modules = [m and fill(m) for m in build_rpe(RPEConfig(rpe_on=rpe_on), dim, heads)]
    qkv = [torch.randn(batch, heads, length, dim, requires_grad=True) for _ in range(3)]
    with LargestTensor() as largest:
        rpe_attention(*qkv, *modules, height=4, width=16).square().sum().backward()
    assert 0 < largest.numel <= batch * heads * length * length


def test_a_mask_of_integers_is_refused():
    modules, qkv = encoders(RPEConfig()), tokens(9)
    with pytest.raises(ValueError, match=r"attn_mask must be boolean or floating.*torch.uint8"):
        rpe_attention(*qkv, *modules, attn_mask=torch.ones(9, 9, dtype=torch.uint8))


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (9, 1), (4, 9), (9, 4)])
def test_queries_and_keys_of_different_number_are_refused(queries, keys):
    modules, (q, k, v) = encoders(RPEConfig(rpe_on="qkv")), tokens(9)
    with pytest.raises(ValueError, match=f"got {queries} queries and {keys} keys"):
        rpe_attention(q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], *modules)


def test_tokens_that_do_not_form_a_grid_are_refused():
    with pytest.raises(ValueError, match="do not form a square"):
        rpe_attention(*tokens(8), *encoders(RPEConfig()))
    with pytest.raises(
        ValueError, match="must be 6 for a grid of 2 x 3 and 0 skipped tokens, got 9"
    ):
        rpe_attention(*tokens(9), *encoders(RPEConfig(rpe_on="v")), height=2, width=3)


@pytest.mark.parametrize(
    ("rpe", "expected"),
    [
        (RPEConfig(), r"gather by reference, attention not fused \(chosen: reference\)"),
        (None, "none"),
    ],
    ids=["encodings", "none"],
)
def test_set_implementation_returns_and_logs_what_will_run(rpe, expected, caplog):
    caplog.set_level("INFO", "irpe_core")
    module = torch.nn.ModuleList(each for each in build_rpe(rpe, 8, 2) if each is not None)
    operators = set_implementation(module, "reference", "cpu")
    assert re.match(expected, operators)
    assert caplog.messages == [f"position encodings: {operators}"]
