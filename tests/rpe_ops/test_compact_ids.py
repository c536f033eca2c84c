"""The cache of small bucket ids."""

import pytest
import torch

from irpe_core import RPEConfig
from irpe_core.buckets import grid_buckets
from rpe_ops import compact_ids as module
from rpe_ops.compact_ids import compact_ids, ids_dtype, ids_size, is_small


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    """Give every test a cache of its own."""
    monkeypatch.setattr(module, "_cache", type(module._cache)())


@pytest.mark.parametrize("method", ["product", "euc", "quant", "cross"])
@pytest.mark.parametrize(("grid", "skip"), [((1, 1), 0), ((3, 5), 2), ((8, 16), 1)])
def test_ids_are_padded_to_whole_tiles(method, grid, skip):
    buckets = grid_buckets(RPEConfig(method=method, skip=skip), *grid)
    ids, tokens = compact_ids(buckets), buckets.num_tokens
    assert ids.dtype == torch.uint8
    assert ids.is_contiguous()
    assert ids.shape[1:] == (ids_size(buckets),) * 2
    assert ids_size(buckets) % module.PADDING == 0
    assert torch.equal(ids[:, :tokens, :tokens].long(), buckets.bucket_ids())
    assert not ids[:, tokens:].any()
    assert not ids[:, :, tokens:].any()


def test_the_type_holds_every_id():
    buckets = grid_buckets(RPEConfig(), 2, 2)
    for number, dtype in ((256, torch.uint8), (257, torch.int16), (2**15 + 1, torch.int32)):
        assert ids_dtype(buckets._replace(num_buckets=number)) == dtype


def test_layers_share_ids_and_other_grids_do_not():
    config = RPEConfig(skip=1)
    buckets = grid_buckets(config, 2, 3)
    assert compact_ids(buckets) is compact_ids(buckets._replace())
    assert compact_ids(buckets._replace(skip=2)) is not compact_ids(buckets)
    assert compact_ids(grid_buckets(config, 2, 3)) is not compact_ids(buckets)


def test_an_entry_outlives_its_axis_offsets():
    # If the cache did not hold them, new tensors could get the identity of old ones.
    for method in ("product", "euc") * 8:
        buckets = grid_buckets(RPEConfig(method=method), 3, 3)
        found = compact_ids(buckets)[:, :9, :9]
        assert torch.equal(found.long(), buckets.bucket_ids())


def test_the_cache_is_bounded():
    for width in range(1, 40):
        compact_ids(grid_buckets(RPEConfig(), 1, width))
    assert len(module._cache) == module._MAX_ENTRIES


def test_large_grids_have_no_ids():
    sizes = [(14, 14), (25, 42), (50, 84)]
    assert [is_small(grid_buckets(RPEConfig(), *x, "meta")) for x in sizes] == [True, True, False]
