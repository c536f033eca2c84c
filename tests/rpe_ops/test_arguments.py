"""Wrong arguments of the operators, choice of an implementation, and `RPEIndexFunction`."""

import pytest
import torch

import rpe_ops
from rpe_ops import implementations, ops
from rpe_ops.rpe_index import RPEIndexFunction

LOOKUP = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
IDS = torch.arange(4 * 6).reshape(4, 6) % 5
MESSAGE = r"bucket_ids must be in \[0, 5\), got .*{}"


@pytest.mark.parametrize("bucket", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_a_bucket_out_of_range_is_an_index_error_and_the_next_call_works(bucket, dtype):
    wrong = IDS.to(dtype).clone()
    wrong[3, 5] = bucket
    with pytest.raises(IndexError, match=MESSAGE.format(bucket)):
        rpe_ops.gather(LOOKUP, wrong)
    with pytest.raises(IndexError, match=MESSAGE.format(bucket)):
        rpe_ops.bucket_sum(torch.ones(2, 4, 6), wrong, 5)
    with pytest.raises(IndexError, match=MESSAGE.format(bucket)):
        RPEIndexFunction.apply(LOOKUP, wrong)
    assert torch.equal(rpe_ops.gather(LOOKUP, IDS)[1, 2, 3], LOOKUP[1, 2, 3, IDS[3]])


@pytest.mark.parametrize("bucket", [-1, 5, 2**31 - 1, -(2**31)])
def test_an_unchecked_bucket_out_of_range_is_still_an_error_on_the_cpu(bucket):
    wrong = torch.full((4, 6), bucket)
    with pytest.raises((RuntimeError, IndexError)):
        ops.gather(LOOKUP, wrong, "reference")
    with pytest.raises((RuntimeError, IndexError)):
        ops.bucket_sum(torch.ones(2, 4, 6), wrong, 5, "reference")


@pytest.mark.parametrize(
    ("lookup", "bucket_ids", "message"),
    [
        (LOOKUP.long(), IDS, "lookup must be a tensor of float16, .*int64"),
        (LOOKUP.to(torch.float8_e5m2), IDS, "lookup must be a tensor of float16, .*float8_e5m2"),
        (LOOKUP.cfloat(), IDS, "lookup must be a tensor of float16, .*complex64"),
        (LOOKUP[0, 0, 0], IDS, r"lookup must be .*\(5,\)"),
        (LOOKUP, IDS.short(), "bucket_ids must be int32 or int64, got torch.int16"),
        (LOOKUP, IDS.float(), "bucket_ids must be int32 or int64, got torch.float32"),
        (LOOKUP, IDS[:3], r"bucket_ids must have shape .* L_q = 4, got \(3, 6\)"),
        (LOOKUP, IDS[None], r"bucket_ids must have shape .*, got \(1, 4, 6\)"),
        (LOOKUP.to("meta"), IDS, "bucket_ids must be on the device .* meta, got cpu"),
    ],
    ids=[
        *("integers", "float8", "complex", "one-dimension", "int16", "float32", "queries"),
        *("three-dimensions", "device"),
    ],
)
def test_gather_names_the_argument_that_is_wrong(lookup, bucket_ids, message):
    with pytest.raises(ValueError, match=message):
        rpe_ops.gather(lookup, bucket_ids)


@pytest.mark.parametrize(
    ("pairs", "bucket_ids", "num_buckets", "message"),
    [
        (torch.ones(4, 6).int(), IDS, 5, "pairs must be a tensor of float16, .*int32"),
        (torch.ones(4, 7), IDS, 5, "bucket_ids must have as many keys as pairs, 7, got 6"),
        (torch.ones(3, 6), IDS, 5, "L_q = 3"),
        (torch.ones(4, 6), IDS, 0, r"num_buckets must be in \[1, 1048576\], got 0"),
        (torch.ones(4, 6), IDS, None, "num_buckets must be in .*, got None"),
        (torch.ones(4, 6), IDS, 2**31, "num_buckets must be in .*, got 2147483648"),
    ],
    ids=["integers", "keys", "queries", "no-buckets", "none", "too-many-buckets"],
)
def test_bucket_sum_names_the_argument_that_is_wrong(pairs, bucket_ids, num_buckets, message):
    with pytest.raises(ValueError, match=message):
        rpe_ops.bucket_sum(pairs, bucket_ids, num_buckets)


@pytest.mark.parametrize("name", rpe_ops.IMPLEMENTATIONS)
def test_an_explicit_implementation_runs_or_raises_its_reason(name):
    reason = rpe_ops.available_implementations("cpu")[name]
    assert rpe_ops.can_run(name, "cpu") == (not reason)
    if not reason:
        assert torch.equal(
            rpe_ops.gather(LOOKUP, IDS, implementation=name), rpe_ops.gather(LOOKUP, IDS)
        )
        return
    with pytest.raises(RuntimeError, match=f"{name}.* cannot run on cpu: "):
        rpe_ops.gather(LOOKUP, IDS, implementation=name)
    with pytest.raises(RuntimeError, match=f"{name}.* cannot run on cpu: "):
        rpe_ops.bucket_sum(torch.ones(4, 6), IDS, 5, implementation=name)
    with pytest.raises(RuntimeError) as raised:
        rpe_ops.can_run(name, "cpu", raise_error=True)
    assert reason in str(raised.value)


def test_the_reference_runs_everywhere_and_cuda_does_not_run_on_the_cpu():
    assert rpe_ops.can_run("reference", "cpu")
    assert rpe_ops.can_run("reference", "cuda")
    assert not rpe_ops.can_run("cuda", "cpu")


def test_auto_is_the_first_that_can_run(monkeypatch):
    monkeypatch.setattr(implementations, "_reason_against", lambda *_: "")
    assert implementations.resolve("auto", torch.device("cuda")) == rpe_ops.IMPLEMENTATIONS[0]
    monkeypatch.undo()
    chosen = implementations.resolve("auto", torch.device("cpu"))
    # "auto" never chooses Triton's interpreter.
    reasons = rpe_ops.available_implementations("cpu")
    able = [name for name, reason in reasons.items() if not reason and name != "triton"]
    assert chosen == able[0]


def test_cuda_tensors_never_fall_back_from_a_missing_library(monkeypatch):
    monkeypatch.setattr(implementations.library, "reason_without_cuda", lambda: "it is not built")
    implementations._reason_against.cache_clear()
    with pytest.raises(rpe_ops.ImplementationError, match=r"'cuda' .* it is not built"):
        rpe_ops.can_run("cuda", "cuda", raise_error=True)
    implementations._reason_against.cache_clear()


@pytest.mark.parametrize("name", ["Reference", "numba", ""])
def test_an_unknown_implementation_is_named_with_the_allowed_ones(name):
    with pytest.raises(
        ValueError, match=f"implementation must be one of auto, .*reference, got {name!r}"
    ):
        rpe_ops.gather(LOOKUP, IDS, implementation=name)


def test_rpe_index_function_keeps_the_contract_of_the_original():
    lookup = LOOKUP.double().requires_grad_()
    ids = IDS.int()
    out = RPEIndexFunction.apply(lookup, ids)
    cotangent = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    out.backward(cotangent)
    expected = torch.zeros_like(LOOKUP, dtype=torch.float64)
    for i in range(4):
        for j in range(6):
            assert torch.equal(out[:, :, i, j], lookup[:, :, i, ids[i, j]])
            expected[:, :, i, ids[i, j]] += cotangent[:, :, i, j]
    torch.testing.assert_close(lookup.grad, expected)


def test_rpe_index_function_accepts_four_dimensions_only():
    with pytest.raises(ValueError, match=r"input must have shape \(B, H, L_q, K\), got \(4, 5\)"):
        RPEIndexFunction.apply(LOOKUP[0, 0], IDS)
