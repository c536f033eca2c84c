"""Bucket ids: equal to the recorded ones, and to the formula on any grid and ratio."""

import math

import numpy as np
import pytest
import torch

from irpe_core import METHODS, RPEConfig, bucket_ids, buckets, piecewise_index
from tests.irpe_core import naive
from tests.recipes import golden, golden_json

RECORDED = sorted(golden_json("buckets")["tables"])
PIECEWISE = sorted(key for key in golden("buckets").files if key.startswith("pw_int_"))
RATIOS = [0.1, 0.4, 0.51, 1, 1.3, 1.5, 1.9, 2.0, 2.25, 2.5, 3.375, 7, 20, 33, 64.7]
GRIDS = [(1, 1), (5, 9), (9, 5), (1, 11), (11, 1), (7, 7)]
METHOD_AND_SKIP = [(method, skip) for method in METHODS for skip in (0, 1, 2)]


@pytest.mark.parametrize("key", RECORDED)
def test_bucket_ids_equal_the_recorded_ones(key):
    *method, ratio, grid, skip = key.split("_")
    height, width = map(int, grid.split("x"))
    skip = int(skip.removeprefix("skip"))
    ids = bucket_ids(method[0], height, width, float(ratio), skip)
    if method[0] == "cross":
        ids = ids[["rows", "cols"].index(method[1])]
    assert ids.dtype == torch.int64
    assert np.array_equal(ids.numpy(), golden("buckets")[key])
    config = RPEConfig(ratio=float(ratio), method=method[0], skip=skip)
    assert config.num_buckets == golden_json("buckets")["tables"][key]["num_buckets"]


@pytest.mark.parametrize("key", PIECEWISE)
def test_piecewise_index_equals_the_recorded_one(key):
    alpha, beta, gamma = (float(part[1:]) for part in key.removeprefix("pw_int_").split("_"))
    x = golden("buckets")["pw_x_int"]
    for dtype in (torch.int64, torch.int32, torch.float32):
        index = piecewise_index(torch.from_numpy(x).to(dtype), alpha, beta, gamma)
        assert index.dtype == torch.int64
        assert np.array_equal(index.numpy(), golden("buckets")[key])


@pytest.mark.parametrize("key", PIECEWISE)
def test_piecewise_index_of_halves_rounds_to_even(key):
    alpha, beta, gamma = (float(part[1:]) for part in key.removeprefix("pw_int_").split("_"))
    x = golden("buckets")["pw_x_half"]
    index = piecewise_index(torch.from_numpy(x), alpha, beta, gamma)
    assert index.tolist() == [naive.piecewise(value, alpha, beta, gamma) for value in x]


def test_piecewise_index_accepts_any_shape_and_is_odd_and_bounded():
    x = torch.linspace(-300, 300, 1203).reshape(3, 401)
    index = piecewise_index(x, 1.9, 3.8, 15.2)
    assert index.shape == x.shape
    assert torch.equal(piecewise_index(-x, 1.9, 3.8, 15.2), -index)
    assert (index.min(), index.max()) == (-3, 3)


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"),
    [(0, 2, 8), (-1, 2, 8), (2, 4, 2), (2, 0, 8), (3, 4, 2), (math.nan, 2, 8)],
)
def test_piecewise_index_refuses_coefficients_out_of_order(alpha, beta, gamma):
    with pytest.raises(ValueError, match=f"alpha={alpha}, beta={beta}, gamma={gamma}"):
        piecewise_index(torch.arange(3), alpha, beta, gamma)


@pytest.mark.parametrize("ratio", RATIOS)
def test_steps_equal_the_formula_far_beyond_gamma(ratio):
    bound = math.ceil(800 * ratio)
    x = torch.arange(-bound, bound + 1)
    expected = piecewise_index(x, ratio, 2 * ratio, 8 * ratio)
    assert torch.equal(buckets._index_of_integers(x, ratio, bound), expected)
    assert expected.max() == int(2 * ratio)


@pytest.mark.parametrize("grid", GRIDS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("method", "skip"), METHOD_AND_SKIP)
def test_bucket_ids_equal_the_loop_over_pairs_on_any_grid(method, skip, grid):
    for ratio in (0.4, 1.9, 7):
        ids = bucket_ids(method, *grid, ratio, skip)
        ids = ids if isinstance(ids, tuple) else (ids,)
        expected = naive.buckets(RPEConfig(ratio=ratio, method=method, skip=skip), *grid)
        for actual, wanted in zip(ids, expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("skip", [1, 2])
def test_pairs_with_a_skipped_token_have_their_own_bucket(skip):
    ids = bucket_ids("product", 3, 5, 1.9, skip)
    extra = torch.full_like(ids, 49)
    assert torch.equal(ids[:skip], extra[:skip])
    assert torch.equal(ids[:, :skip], extra[:, :skip])
    assert torch.equal(ids[skip:, skip:], bucket_ids("product", 3, 5, 1.9))


@pytest.mark.parametrize(("ratio", "count"), [(1.9, 49), (2.0, 81), (2.5, 121), (3.0, 169)])
def test_product_has_the_published_number_of_buckets(ratio, count):
    assert RPEConfig(ratio=ratio).num_buckets == count
    assert RPEConfig(ratio=ratio, skip=1).num_buckets == count + 1
    ids = bucket_ids("product", 30, 30, ratio)
    assert set(ids.flatten().tolist()) == set(range(count))


def test_bucket_ids_can_be_computed_on_another_device():
    assert bucket_ids("euc", 3, 4, 1.9, 1, device="meta").shape == (13, 13)
    assert all(ids.device.type == "meta" for ids in bucket_ids("cross", 3, 4, 1.9, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prod", 3, 3, 1.9), "method must be one of euc, quant, cross, product, got 'prod'"),
        (("euc", 0, 3, 1.9), "grid must be at least 1 x 1, got 0 x 3"),
        (("euc", 3, -1, 1.9), "grid must be at least 1 x 1, got 3 x -1"),
        (("euc", 3, 3, 0), "ratio must be a finite number > 0, got 0"),
        (("euc", 3, 3, 1.9, -1), "skip must be a whole number >= 0, got -1"),
    ],
    ids=["method", "height", "width", "ratio", "skip"],
)
def test_bucket_ids_names_the_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        bucket_ids(*arguments)


@pytest.mark.parametrize(("method", "axis"), [("euc", 0), ("product", 0), ("cross", 1)])
def test_opcheck_of_bucket_ids(method, axis):
    arguments = (method, axis, 3, 5, 1.9, 1, torch.device("cpu"))
    torch.library.opcheck(torch.ops.irpe_core.bucket_ids.default, arguments)


@pytest.mark.parametrize("method", METHODS)
def test_opcheck_of_axis_offsets(method):
    arguments = (method, 3, 5, 1.9, torch.device("cpu"))
    torch.library.opcheck(torch.ops.irpe_core.axis_offsets.default, arguments)
