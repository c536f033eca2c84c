"""No argument of `torch.ops.rpe_ops_cpp.*` ends the process: each wrong one raises an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rpe_ops import raw_calls
from tests.rpe_ops.extension import provide_library

# Replacements that are allowed, because the leading dimensions and the numbers of keys and of
# buckets are free, some dtypes are, and a table of one head is shared by all.
_FREE_VALUES = [f"{change}-{dim}" for change in ("longer", "shorter", "empty") for dim in (0, 1)]
_FREE_VALUES += ["rank-below", "rank-above", "float16", "float64"]
ALLOWED = {
    ("gather", "lookup"): {*_FREE_VALUES, "longer-3"},
    ("gather", "bucket_ids"): {"longer-1", "shorter-1", "empty-1", "int32"},
    ("bucket_sum", "pairs"): {*_FREE_VALUES},
    ("bucket_sum", "bucket_ids"): {"int32"},
    **{
        (f"attention_{step}", f"table_{name}"): {"shorter-0"}
        for step in ("forward", "backward")
        for name in "kqv"
    },
}
# The last two are the errors of torch: arguments of another type, tensors of another device.
ERRORS = ("ValueError", "IndexError", "RuntimeError", "NotImplementedError")


def test_every_wrong_argument_of_every_operator_is_an_error_that_names_it():
    provide_library()
    done = subprocess.run(
        [sys.executable, "-m", "tests.rpe_ops.raw_calls"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{lines[-1:]} {done.stderr[-2000:]}"
    cases = list(zip(lines[::2], lines[1::2], strict=True))
    assert len(cases) > 1000
    unchecked = [
        case for case, error in cases if not error and case[2] not in ALLOWED.get((*case[:2],), ())
    ]
    assert unchecked == []
    assert [(case, error) for case, error in cases if error and not error.startswith(ERRORS)] == []
    checked = [case for case in cases if case[1].startswith(("ValueError", "IndexError"))]
    assert [(case, error) for case, error in checked if " must " not in error] == []
    # An unsupported dtype is an error of the argument itself, other values may disagree with any.
    for case, error in checked:
        if case[2] in ("float8_e4m3fn", "complex64", "int8"):
            assert error.startswith(f"ValueError: {case[1]} must "), case


@pytest.mark.parametrize("name", raw_calls.operators())
def test_strides_do_not_change_a_result(name):
    provide_library()
    operator = getattr(torch.ops.rpe_ops_cpp, name)
    # In float64, because a product of matrices rounds differently with other strides.
    arguments = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in raw_calls.operators()[name].values()
    ]
    strided = [
        x.repeat_interleave(2, -1)[..., ::2] if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    expected, actual = operator(*arguments), operator(*strided)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("num_buckets", [2**20, 2**20 + 1])
def test_the_number_of_buckets_is_bounded(num_buckets):
    provide_library()
    pairs, ids = torch.ones(1, 2), torch.tensor([[0, 2**20 - 1]])
    if num_buckets == 2**20:
        summed = torch.ops.rpe_ops_cpp.bucket_sum(pairs, ids, num_buckets)
        assert summed.nonzero().tolist() == [[0, 0], [0, 2**20 - 1]]
        return
    with pytest.raises(ValueError, match=r"num_buckets must be in \[1, 1048576\], got 1048577"):
        torch.ops.rpe_ops_cpp.bucket_sum(pairs, ids, num_buckets)
