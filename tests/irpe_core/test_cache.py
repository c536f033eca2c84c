"""The cache of bucket ids: bounded, shared, right for any order of sizes, and thread-safe."""

import itertools
import random
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from irpe_core import BucketCache, RPEConfig, bucket_ids, buckets, build_rpe, encoding

PRODUCT = RPEConfig(skip=1)
LIKE = torch.empty(0)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> BucketCache:
    """Replace the shared cache by an empty one."""
    cache = BucketCache()
    monkeypatch.setattr(encoding, "BUCKET_CACHE", cache)
    return cache


def nbytes(height: int, width: int, skip: int = 1) -> int:
    return 8 * (skip + height * width) ** 2


def test_it_never_exceeds_its_bound_and_drops_the_least_recently_used():
    cache = BucketCache(max_bytes=2 * nbytes(5, 5))
    for height, width in itertools.product(range(1, 6), range(1, 6)):
        cache.get(PRODUCT, height, width, 0, LIKE)
        assert 0 < cache.nbytes <= cache.max_bytes
    cache = BucketCache(max_bytes=2 * nbytes(5, 5))
    first = cache.get(PRODUCT, 5, 5, 0, LIKE)
    second = cache.get(PRODUCT, 1, 25, 0, LIKE)
    assert cache.get(PRODUCT, 5, 5, 0, LIKE) is first
    cache.get(PRODUCT, 25, 1, 0, LIKE)
    assert cache.get(PRODUCT, 5, 5, 0, LIKE) is first
    assert cache.get(PRODUCT, 1, 25, 0, LIKE) is not second


def test_an_entry_larger_than_the_bound_is_right_and_is_not_kept():
    cache = BucketCache(max_bytes=nbytes(5, 5))
    small = cache.get(PRODUCT, 3, 3, 0, LIKE)
    large = cache.get(PRODUCT, 6, 7, 0, LIKE)
    assert torch.equal(large, bucket_ids("product", 6, 7, 1.9, 1))
    assert cache.get(PRODUCT, 3, 3, 0, LIKE) is small
    assert (len(cache), cache.nbytes) == (1, nbytes(3, 3))


def test_clear_frees_everything():
    cache = BucketCache()
    cache.get(PRODUCT, 3, 3, 0, LIKE)
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_all_encodings_share_the_bucket_ids_of_a_grid(cache):
    modules = [*build_rpe(RPEConfig(skip=1, rpe_on="qkv"), 8, 2)]
    modules += build_rpe(RPEConfig(skip=1, rpe_on="qk", mode="bias", shared_head=False), 8, 2)[:2]
    for rpe in modules:
        x = torch.randn(1, 2, 16, 16 if rpe is modules[2] else 8)
        rpe(x, 3, 5)
        rpe(x, 3, 5)
    assert len(cache) == 1


@pytest.mark.parametrize("method", ["euc", "quant", "cross", "product"])
def test_bucket_ids_are_right_after_any_order_of_sizes(cache, method):
    # Grids with the same number of tokens must not be confused.
    grids = [(4, 4), (2, 8), (8, 2), (1, 16), (16, 1), (3, 5), (5, 3)]
    uses = list(itertools.product(grids, (0, 1), (1.9, 2.0), (0, 1) if method == "cross" else (0,)))
    for seed in range(3):
        random.Random(seed).shuffle(uses)
        for grid, skip, ratio, axis in uses:
            ids = cache.get(RPEConfig(ratio, method, skip=skip), *grid, axis, LIKE)
            expected = bucket_ids(method, *grid, ratio, skip)
            assert torch.equal(ids, expected[axis] if method == "cross" else expected)


def test_modules_are_right_after_any_order_of_sizes(cache):
    rpe = build_rpe(RPEConfig(rpe_on="k"), 4, 1)[1]
    torch.nn.init.normal_(rpe.lookup_table_weight)
    grids = [(2, 6), (6, 2), (3, 4), (4, 3), (2, 2), (1, 12), (12, 1)]
    x = torch.randn(1, 1, 12, 4)
    for order in (grids, grids[::-1], grids[3:] + grids[:3]):
        for height, width in order:
            rows = x[:, :, : height * width]
            ids = bucket_ids("product", height, width, 1.9)
            expected = torch.gather(rows @ rpe.lookup_table_weight[0], -1, ids[None, None])
            torch.testing.assert_close(rpe(rows, height, width), expected)


def test_training_works_after_a_first_use_in_inference_mode(cache):
    rpe = build_rpe(RPEConfig(rpe_on="k"), 4, 1)[1]
    with torch.inference_mode():
        rpe(torch.randn(1, 1, 6, 4), 2, 3)
    assert len(cache) == 1
    rpe(torch.randn(1, 1, 6, 4), 2, 3).sum().backward()
    assert rpe.lookup_table_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("method", ["euc", "cross", "product"])
def test_fake_tensors_neither_enter_the_cache_nor_leave_it(cache, method, warm):
    config = RPEConfig(ratio=1.7, method=method, rpe_on="qkv")
    rpe = build_rpe(config, 4, 2)
    if warm:
        rpe[1](torch.randn(1, 2, 6, 4), 2, 3)
    with FakeTensorMode():
        fake = build_rpe(config, 4, 2)
        assert isinstance(fake[1](torch.randn(1, 2, 6, 4), 2, 3), FakeTensor)
        assert fake[2](torch.randn(1, 2, 6, 6), 2, 3).shape == (1, 2, 6, 4)
    out = rpe[1](torch.randn(1, 2, 6, 4), 2, 3)
    assert type(out) is torch.Tensor
    assert all(type(entry) is torch.Tensor for entry in cache._entries.values())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_code_adds_nothing_to_the_cache(cache, dynamic):
    rpe = build_rpe(RPEConfig(rpe_on="k"), 4, 1)[1]
    torch.nn.init.normal_(rpe.lookup_table_weight)
    torch.compiler.reset()
    compiled = torch.compile(rpe, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for height, width in ((2, 3), (3, 2), (4, 4)):
        x = torch.randn(1, 1, height * width, 4)
        traced = compiled(x, height, width)
        assert len(cache) == 0
        torch.testing.assert_close(traced, rpe(x, height, width))
        cache.clear()


def test_an_entry_that_two_threads_compute_at_once_is_counted_once(monkeypatch):
    cache, compute, overtaken = BucketCache(), buckets._bucket_ids_op, []

    def overtake(*arguments: object) -> torch.Tensor:
        if not overtaken:
            overtaken.append(True)
            cache.get(PRODUCT, 3, 3, 0, LIKE)
        return compute(*arguments)

    monkeypatch.setattr(buckets, "_bucket_ids_op", overtake)
    cache.get(PRODUCT, 3, 3, 0, LIKE)
    assert (len(cache), cache.nbytes) == (1, nbytes(3, 3))


def test_threads_get_right_bucket_ids_and_the_number_of_bytes_stays_right():
    cache = BucketCache(max_bytes=3 * nbytes(4, 4))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(200):
                height, width = draw.randint(1, 4), draw.randint(1, 4)
                ids = cache.get(PRODUCT, height, width, 0, LIKE)
                assert ids.shape == (height * width + 1,) * 2
                assert cache.nbytes <= cache.max_bytes
                if draw.random() < 0.02:
                    cache.clear()
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not failures
    assert cache.nbytes == sum(entry.nbytes for entry in cache._entries.values())
