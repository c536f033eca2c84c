"""The encodings: recorded values and gradients, shapes, memory, dtypes, devices and copies."""

import copy
import io
import pickle

import pytest
import torch

from irpe_core import (
    METHODS,
    BiasRPE,
    ContextualRPE,
    CrossRPE,
    RPEConfig,
    ValueRPE,
    build_rpe,
    get_rpe_config,
)
from irpe_core.encoding import resolve_grid
from tests.irpe_core import naive
from tests.irpe_core.largest_tensor import LargestTensor
from tests.recipes import fill, golden, golden_json, recipe_a

HEADS, DIM, GRID = 3, 16, (5, 7)
RECORDED = golden_json("rpe_modules")["cases"]


@pytest.mark.parametrize("case", RECORDED)
def test_values_and_gradients_equal_the_recorded_ones(case):
    on, mode, method, shared, skip, ratio = case.split("_")
    config = get_rpe_config(
        ratio=float(ratio[1:]),
        method=method,
        mode=mode,
        shared_head=shared == "shared",
        skip=int(skip.removeprefix("skip")),
        rpe_on=on,
    )
    rpe = build_rpe(config, DIM, HEADS)["qkv".index(on)].double()
    assert {k: list(v.shape) for k, v in rpe.state_dict().items()} == RECORDED[case]["params"]
    arrays = golden("rpe_modules")
    fill(rpe, recipe_a, factor=1.0)
    for name, parameter in rpe.named_parameters():
        recorded = torch.from_numpy(arrays[f"{case}/table/{name}"])
        torch.testing.assert_close(parameter.data, recorded, rtol=0, atol=1e-12)
    kind = "v" if on == "v" else "qk"
    x = torch.from_numpy(arrays[f"x_{kind}_skip{config.skip}"]).requires_grad_()
    out = rpe(x, *GRID)
    assert list(out.shape) == RECORDED[case]["out_shape"]
    torch.testing.assert_close(out, torch.from_numpy(arrays[f"{case}/out"]), rtol=0, atol=1e-10)
    cotangent = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape)
    (out * cotangent).sum().backward()
    if RECORDED[case]["has_gx"]:
        recorded = torch.from_numpy(arrays[f"{case}/gx"])
        torch.testing.assert_close(x.grad, recorded, rtol=0, atol=1e-10)
    for name, parameter in rpe.named_parameters():
        recorded = torch.from_numpy(arrays[f"{case}/gtable/{name}"])
        torch.testing.assert_close(parameter.grad, recorded, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-head"])
@pytest.mark.parametrize("skip", [0, 1])
def test_tables_have_the_published_names_and_shapes_and_start_at_zero(method, shared, skip):
    heads = 1 if shared else HEADS
    config = RPEConfig(method=method, shared_head=shared, skip=skip, rpe_on="qkv")
    buckets = config.num_buckets
    prefixes = ("rp_rows.", "rp_cols.") if method == "cross" else ("",)
    qk = {f"{prefix}lookup_table_weight": (heads, DIM, buckets) for prefix in prefixes}
    v = {f"{prefix}lookup_table_weight": (heads, buckets, DIM) for prefix in prefixes}
    bias = {f"{prefix}lookup_table_bias": (heads, buckets) for prefix in prefixes}
    for rpe, expected in zip(build_rpe(config, DIM, HEADS), (qk, qk, v), strict=True):
        assert {name: tuple(table.shape) for name, table in rpe.state_dict().items()} == expected
        assert not any(parameter.any() for parameter in rpe.parameters())
    config = RPEConfig(method=method, mode="bias", shared_head=shared, skip=skip, rpe_on="q")
    rpe = build_rpe(config, DIM, HEADS)[0]
    assert {name: tuple(table.shape) for name, table in rpe.state_dict().items()} == bias


@pytest.mark.parametrize("rpe_on", ["q", "k", "v", "qk", "kv", "qkv"])
def test_build_rpe_builds_the_encodings_of_rpe_on_and_no_others(rpe_on):
    modules = build_rpe(RPEConfig(rpe_on=rpe_on), DIM, HEADS)
    assert [module is not None for module in modules] == [c in rpe_on for c in "qkv"]
    assert build_rpe(None, DIM, HEADS) == (None, None, None)


def test_build_rpe_chooses_the_encoding_by_letter_and_mode():
    kinds = [type(m) for m in build_rpe(RPEConfig(rpe_on="qkv"), DIM, HEADS)]
    assert kinds == [ContextualRPE, ContextualRPE, ValueRPE]
    assert type(build_rpe(RPEConfig(mode="bias"), DIM, HEADS)[1]) is BiasRPE
    cross = build_rpe(RPEConfig(method="cross", rpe_on="v"), DIM, HEADS)[2]
    assert [type(m) for m in (cross, cross.rp_rows, cross.rp_cols)] == [
        CrossRPE,
        ValueRPE,
        ValueRPE,
    ]


@pytest.mark.parametrize("rpe_on", ["k", "v"])
@pytest.mark.parametrize("method", ["product", "cross"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-head"])
def test_no_tensor_of_size_l_l_d_is_built_in_either_pass(rpe_on, method, shared):
    batch, heads, length, dim = 2, 2, 64, 48
    config = RPEConfig(method=method, shared_head=shared, rpe_on=rpe_on)
    rpe = build_rpe(config, dim, heads)["qkv".index(rpe_on)]
    x = torch.randn(batch, heads, length, length if rpe_on == "v" else dim, requires_grad=True)
    with LargestTensor() as largest:
        rpe(x, 4, 16).square().sum().backward()
    assert 0 < largest.numel <= batch * heads * length * max(length, dim, config.num_buckets)


@pytest.mark.parametrize(
    ("tokens", "skip", "grid", "message"),
    [
        (35, 0, (None, None), "35 tokens without 0 skipped ones do not form a square"),
        (36, 1, (None, None), "36 tokens without 1 skipped ones do not form a square"),
        (1, 1, (None, None), "do not form a square"),
        (1, 2, (None, None), "do not form a square"),
        (35, 0, (5, None), "height and width must both be given or both be None, got 5 and None"),
        (35, 0, (5, 8), "must be 40 for a grid of 5 x 8 and 0 skipped tokens, got 35"),
        (35, 1, (5, 7), "must be 36 for a grid of 5 x 7 and 1 skipped tokens, got 35"),
        (35, 0, (-5, -7), "got 35"),
    ],
)
def test_a_grid_that_does_not_match_the_tokens_is_refused(tokens, skip, grid, message):
    with pytest.raises(ValueError, match=message):
        resolve_grid(tokens, skip, *grid)
    rpe = build_rpe(RPEConfig(skip=skip), DIM, HEADS)[1]
    with pytest.raises(ValueError, match=message):
        rpe(torch.randn(1, HEADS, tokens, DIM), *grid)


@pytest.mark.parametrize("side", [1, 2, 13, 1000, 94906267])
def test_square_numbers_of_tokens_of_any_size_are_recognized(side):
    assert resolve_grid(side * side + 2, 2, None, None) == (side, side)
    for tokens in (side * side + 1, side * side - 1):
        with pytest.raises(ValueError, match="do not form a square"):
            resolve_grid(tokens if side > 1 else 3, 0, None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("method", ["product", "cross"])
def test_modules_compute_in_the_dtype_they_are_moved_to(dtype, method):
    config = RPEConfig(method=method, rpe_on="kv", shared_head=False)
    ids = naive.buckets(config, *GRID)
    _, rpe_k, rpe_v = (m and fill(m).to(dtype) for m in build_rpe(config, DIM, HEADS))
    x, attn = torch.randn(2, HEADS, 35, DIM).to(dtype), torch.rand(2, HEADS, 35, 35).to(dtype)
    on_k, on_v = rpe_k(x, *GRID), rpe_v(attn, *GRID)
    assert on_k.dtype == on_v.dtype == dtype
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    expected = naive.logit_bias(x.double(), naive.tables_of(rpe_k, HEADS), ids, "ctx")
    torch.testing.assert_close(on_k.double(), expected, **tolerance)
    expected = sum(
        torch.einsum("bhij,hijd->bhid", attn.double(), table[:, index])
        for table, index in zip(naive.tables_of(rpe_v, HEADS), ids, strict=True)
    )
    torch.testing.assert_close(on_v.double(), expected, **tolerance)


def test_modules_work_on_the_meta_device_and_move_from_it():
    with torch.device("meta"):
        rpe_q, _, rpe_v = build_rpe(RPEConfig(rpe_on="qv", method="cross"), DIM, HEADS)
        assert rpe_q(torch.empty(2, HEADS, 35, DIM), *GRID).shape == (2, HEADS, 35, 35)
        assert rpe_v(torch.empty(2, HEADS, 35, 35), *GRID).device.type == "meta"
    rpe_q = rpe_q.to_empty(device="cpu")
    rpe_q.rp_rows.reset_parameters()
    rpe_q.rp_cols.reset_parameters()
    out = rpe_q(torch.randn(2, HEADS, 35, DIM), *GRID)
    assert torch.equal(out, torch.zeros(2, HEADS, 35, 35))


@pytest.mark.parametrize("method", ["product", "cross"])
def test_copies_and_pickles_are_equal_and_independent_and_hold_no_bucket_ids(method):
    rpe = fill(build_rpe(RPEConfig(method=method), DIM, HEADS)[1])
    x = torch.randn(2, HEADS, 900, DIM)
    expected = rpe(x, 30, 30)
    saved = io.BytesIO()
    torch.save(rpe, saved)
    assert len(saved.getvalue()) < 20_000
    saved.seek(0)
    copies = [
        copy.deepcopy(rpe),
        pickle.loads(pickle.dumps(rpe)),
        torch.load(saved, weights_only=False),
    ]
    for twin in copies:
        assert torch.equal(twin(x, 30, 30), expected)
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
    assert torch.equal(rpe(x, 30, 30), expected)


def test_the_representation_shows_the_configuration():
    rpe = build_rpe(RPEConfig(ratio=2.0, method="euc", skip=1, shared_head=False), DIM, HEADS)[1]
    assert repr(rpe) == "ContextualRPE(euc, ratio=2.0, buckets=10, heads=3, head_dim=16, skip=1)"
