"""What the operators refuse, how they choose an implementation, and the original's entry point."""

import pytest
import torch

import rpe_ops
from rpe_ops import implementations, ops
from rpe_ops.rpe_index import RPEIndexFunction

LOOKUP = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
INDEX = torch.arange(4 * 6).reshape(4, 6) % 5


@pytest.mark.parametrize("bucket", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_a_bucket_out_of_range_is_an_index_error_and_the_next_call_works(bucket, dtype):
    wrong = INDEX.to(dtype).clone()
    wrong[3, 5] = bucket
    with pytest.raises(IndexError, match=f"{bucket}.*allowed are 0 to 4"):
        rpe_ops.gather(LOOKUP, wrong)
    with pytest.raises(IndexError, match=f"{bucket}.*allowed are 0 to 4"):
        rpe_ops.bucket_sum(torch.ones(2, 4, 6), wrong, 5)
    with pytest.raises(IndexError, match=f"{bucket}.*allowed are 0 to 4"):
        RPEIndexFunction.apply(LOOKUP, wrong)
    assert torch.equal(rpe_ops.gather(LOOKUP, INDEX)[1, 2, 3], LOOKUP[1, 2, 3, INDEX[3]])


@pytest.mark.parametrize("bucket", [-1, 5, 2**31 - 1, -(2**31)])
def test_an_unchecked_bucket_out_of_range_is_still_an_error_on_the_cpu(bucket):
    wrong = torch.full((4, 6), bucket)
    with pytest.raises((RuntimeError, IndexError)):
        ops.gather(LOOKUP, wrong, "reference")
    with pytest.raises((RuntimeError, IndexError)):
        ops.bucket_sum(torch.ones(2, 4, 6), wrong, 5, "reference")


@pytest.mark.parametrize(
    ("lookup", "index", "message"),
    [
        (LOOKUP.long(), INDEX, "lookup must be a floating-point tensor.*int64"),
        (LOOKUP[0, 0, 0], INDEX, r"lookup must be .*\(5,\)"),
        (LOOKUP, INDEX.short(), "index must be int32 or int64, got torch.int16"),
        (LOOKUP, INDEX.float(), "index must be int32 or int64, got torch.float32"),
        (LOOKUP, INDEX[:3], r"index must have shape .* L_q = 4, got \(3, 6\)"),
        (LOOKUP, INDEX[None], r"index must have shape .*, got \(1, 4, 6\)"),
        (LOOKUP.to("meta"), INDEX, "index is on cpu, the values are on meta"),
    ],
    ids=["integers", "one-dimension", "int16", "float-index", "queries", "index-3d", "device"],
)
def test_gather_names_the_argument_that_is_wrong(lookup, index, message):
    with pytest.raises(ValueError, match=message):
        rpe_ops.gather(lookup, index)


@pytest.mark.parametrize(
    ("pairs", "index", "num_buckets", "message"),
    [
        (torch.ones(4, 6).int(), INDEX, 5, "pairs must be a floating-point tensor.*int32"),
        (torch.ones(4, 7), INDEX, 5, "index has 6 keys, pairs has 7"),
        (torch.ones(3, 6), INDEX, 5, "L_q = 3"),
        (torch.ones(4, 6), INDEX, 0, "num_buckets must be at least 1, got 0"),
    ],
    ids=["integers", "keys", "queries", "no-buckets"],
)
def test_bucket_sum_names_the_argument_that_is_wrong(pairs, index, num_buckets, message):
    with pytest.raises(ValueError, match=message):
        rpe_ops.bucket_sum(pairs, index, num_buckets)


@pytest.mark.parametrize("name", rpe_ops.IMPLEMENTATIONS)
def test_an_explicit_implementation_runs_or_raises_its_reason(name):
    reason = rpe_ops.available_implementations("cpu")[name]
    assert rpe_ops.can_run(name, "cpu") == (not reason)
    if not reason:
        assert torch.equal(
            rpe_ops.gather(LOOKUP, INDEX, implementation=name), rpe_ops.gather(LOOKUP, INDEX)
        )
        return
    with pytest.raises(RuntimeError, match=f"{name}.* cannot run on cpu: "):
        rpe_ops.gather(LOOKUP, INDEX, implementation=name)
    with pytest.raises(RuntimeError, match=f"{name}.* cannot run on cpu: "):
        rpe_ops.bucket_sum(torch.ones(4, 6), INDEX, 5, implementation=name)
    with pytest.raises(RuntimeError) as raised:
        rpe_ops.can_run(name, "cpu", raise_error=True)
    assert reason in str(raised.value)


def test_the_reference_runs_everywhere_and_cuda_does_not_run_on_the_cpu():
    assert rpe_ops.can_run("reference", "cpu")
    assert rpe_ops.can_run("reference", "cuda")
    assert not rpe_ops.can_run("cuda", "cpu")


def test_auto_takes_the_first_that_can_run(monkeypatch):
    monkeypatch.setattr(implementations, "_reason_against", lambda *_: "")
    assert implementations.resolve("auto", torch.device("cuda")) == rpe_ops.IMPLEMENTATIONS[0]
    monkeypatch.undo()
    chosen = implementations.resolve("auto", torch.device("cpu"))
    # Triton's interpreter, if it is on, is left out.
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
def test_an_unknown_implementation_is_named_with_what_is_allowed(name):
    with pytest.raises(ValueError, match=f"{name!r}: choose one of auto, .*reference"):
        rpe_ops.gather(LOOKUP, INDEX, implementation=name)


def test_rpe_index_function_keeps_the_contract_of_the_original():
    lookup = LOOKUP.double().requires_grad_()
    index = INDEX.int()
    out = RPEIndexFunction.apply(lookup, index)
    cotangent = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    out.backward(cotangent)
    expected = torch.zeros_like(LOOKUP, dtype=torch.float64)
    for i in range(4):
        for j in range(6):
            assert torch.equal(out[:, :, i, j], lookup[:, :, i, index[i, j]])
            expected[:, :, i, index[i, j]] += cotangent[:, :, i, j]
    torch.testing.assert_close(lookup.grad, expected)


def test_rpe_index_function_takes_four_dimensions_only():
    with pytest.raises(ValueError, match=r"input must be \(B, H, L_q, K\), got shape \(4, 5\)"):
        RPEIndexFunction.apply(LOOKUP[0, 0], INDEX)
