"""Calls of the compiled operators with wrong arguments, for test_raw_operators.py.

Run as a program, because an operator that trusts such an argument ends the process. Each case is
printed before its call, so that the last line names the case that crashed.
"""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rpe_ops.library import load_library
from tests.rpe_ops.extension import provide_library

BATCH, HEADS, DIM, BUCKETS = 2, 2, 4, 7
HEIGHT, WIDTH, SKIP = 2, 3, 1
TOKENS = SKIP + HEIGHT * WIDTH
DTYPES = [torch.float8_e4m3fn, torch.complex64, torch.int8, torch.int16, torch.bool]
DTYPES += [torch.float16, torch.float32, torch.float64, torch.int32, torch.int64]
# Values of an id or an axis offset that are out of range.
WRONG_IDS = [-1, BUCKETS, 2**31 - 1, -(2**31)]
WRONG_INTS = [0, -1, 2**20 + 1, 2**31, 2**62, -(2**63), 1.5, None]
WRONG_FLOATS = [math.nan, math.inf, -math.inf, "1", None]


def operators() -> dict[str, dict[str, Any]]:
    """Return valid arguments of every compiled operator, by name."""
    torch.manual_seed(0)
    shape, lookups = (BATCH, HEADS, TOKENS), 2 * BUCKETS
    ids = torch.randint(BUCKETS, (TOKENS, 5))
    inputs = {name: torch.randn(*shape, DIM) for name in "qkv"}
    inputs |= {name: torch.randn(HEADS, DIM, lookups) for name in ("table_k", "table_q")}
    inputs |= {
        "table_v": torch.randn(HEADS, lookups, DIM),
        "row_base": torch.randint(3, (2, 2 * HEIGHT - 1), dtype=torch.int32),
        "local": torch.randint(4, (2, 1, 2 * WIDTH - 1), dtype=torch.int32),
        "height": HEIGHT,
        "width": WIDTH,
        "skip": SKIP,
        "num_buckets": BUCKETS,
        "key_padding": torch.zeros(BATCH, TOKENS, dtype=torch.bool),
        "seed": torch.tensor([3]),
    }
    results = {"out": torch.randn(*shape, DIM), "sums": torch.randn(*shape, lookups)}
    results["lse"] = torch.randn(shape)
    numbers = {"scale": 0.5, "dropout_p": 0.1}
    return {
        "gather": {"lookup": torch.randn(*shape, BUCKETS), "bucket_ids": ids},
        "bucket_sum": {"pairs": torch.randn(*shape, 5), "bucket_ids": ids, "num_buckets": BUCKETS},
        "attention_forward": {**inputs, **numbers},
        "attention_backward": {
            "grad_out": torch.randn(*shape, DIM),
            **inputs,
            **results,
            **numbers,
        },
    }


def wrong_tensors(name: str, x: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield replacements of a tensor, each with a name; few of them are allowed."""
    for dim in range(x.ndim):
        yield f"longer-{dim}", torch.cat([x, x.narrow(dim, 0, 1)], dim)
        yield f"shorter-{dim}", x.narrow(dim, 0, x.shape[dim] - 1)
        yield f"empty-{dim}", x.narrow(dim, 0, 0)
    yield "rank-below", x[0]
    yield "rank-above", x[None]
    yield "scalar", x.flatten()[0]
    yield "nothing", x.new_empty(0)
    yield "huge", x.flatten()[:1].expand(2**40)
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield str(dtype).removeprefix("torch."), x.to(dtype)
    yield "meta", x.to("meta")
    yield "sparse", x.to_sparse()
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    yield "freed", freed
    if name in ("bucket_ids", "row_base", "local"):
        for value in WRONG_IDS:
            wrong = x.clone()
            wrong[(-1,) * x.ndim] = value
            yield f"value-{value}", wrong
    yield "text", "x"


def wrong_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield replacements of an argument, each with a name."""
    if isinstance(value, Tensor):
        yield from wrong_tensors(name, value)
    elif isinstance(value, int):
        yield from ((repr(wrong), wrong) for wrong in WRONG_INTS)
    else:
        more = [1.0, -0.1, 2.0] if name == "dropout_p" else []
        yield from ((repr(wrong), wrong) for wrong in WRONG_FLOATS + more)


def kind(value: Any) -> tuple:
    """Return what two arguments have in common that can be exchanged without an error."""
    if isinstance(value, Tensor):
        # Both tables of attention with tokens have the same shape, as have the tokens.
        return value.dtype, value.shape
    return (type(value),)


def call(name: str, arguments: dict[str, Any]) -> str:
    """Return the error of a call; empty if there is none."""
    try:
        getattr(torch.ops.rpe_ops_cpp, name)(*arguments.values())
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def main() -> None:
    """Print the name of every case as JSON, then the error of its call."""
    provide_library()
    assert load_library() == ""
    registered = torch._C._dispatch_get_all_op_names()
    assert {f"rpe_ops_cpp::{name}" for name in operators()} == {
        name for name in registered if name.startswith("rpe_ops_cpp::")
    }
    for name, valid in operators().items():
        assert call(name, valid) == "", call(name, valid)
        replaced = (
            (argument, what, {**valid, argument: wrong})
            for argument, value in valid.items()
            for what, wrong in wrong_values(argument, value)
        )
        exchanged = (
            (a, f"exchanged with {b}", {**valid, a: valid[b], b: valid[a]})
            for a, b in itertools.combinations(valid, 2)
            if kind(valid[a]) != kind(valid[b])
        )
        for argument, what, arguments in itertools.chain(replaced, exchanged):
            print(json.dumps([name, argument, what]), flush=True)
            print(json.dumps(call(name, arguments)), flush=True)


if __name__ == "__main__":
    main()
