"""Cases of the operators: shapes, types and values that disagree, in Python and in C++."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rpe_ops
from irpe_core import RPEConfig
from rpe_ops import GridBuckets
from tests.campaign.base import Base
from tests.campaign.oracle import Verdict, trial

__all__ = ["operators_case"]

_ERRORS = (ValueError, IndexError, TypeError, RuntimeError, OverflowError)
_CULPRITS = (
    *("must be", "bucket", "lookup", "pairs", "num_buckets", "table", "implementation", "dtype"),
    *(
        "memory",
        "size",
        "shape",
        "argument",
        "tensor",
        "not implemented",
        "row_base",
        "local",
        "grid",
        "ratio",
    ),
)
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64),
    *(torch.int16, torch.bool, torch.complex64, torch.float8_e4m3fn),
)


def operators_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Call an operator with wrong arguments; a result must be that of the reference."""
    call = rng.choice((_gather, _bucket_sum, _attention, _attention, _raw, _raw, _configuration))
    seed = rng.randrange(2**32)

    def run_call(argv: list[str]) -> None:
        torch.manual_seed(seed)
        call(random.Random(seed))

    return trial(folder, run_call, culprits=_CULPRITS, expected=_ERRORS)


def _gather(rng: random.Random) -> None:
    """Call `gather`."""
    lookup, ids = _tensor(rng, (2, 3, 5)), _ids(rng, (3, 4))
    _compare(
        *(
            rpe_ops.gather(lookup, ids, implementation=name, check_bounds=rng.random() < 0.8)
            for name in _implementations(rng)
        )
    )


def _bucket_sum(rng: random.Random) -> None:
    """Call `bucket_sum`."""
    pairs, ids = _tensor(rng, (2, 3, 4)), _ids(rng, (3, 4))
    number = rng.choice((5, 5, 5, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**30, 1.5, None))
    _compare(
        *(
            rpe_ops.bucket_sum(pairs, ids, number, implementation=name)
            for name in _implementations(rng)
        )
    )


def _attention(rng: random.Random) -> None:
    """Call `attention`."""
    heads, tokens, channels, buckets = 2, 7, 4, 10
    shape = (1, heads, tokens, channels)
    q, k, v = (_tensor(rng, shape, wrong=0.15) for _ in range(3))
    grid = {
        "row_base": _ids(rng, (1, 3), wrong=0.2, dtype=torch.int32),
        "local": _ids(rng, (1, 1, 5), wrong=0.2, dtype=torch.int32),
        "height": 2,
        "width": 3,
        "skip": 1,
        "num_buckets": buckets,
        "run_width": 5,
    }
    if rng.random() < 0.4:
        name = rng.choice(("height", "width", "skip", "num_buckets", "run_width"))
        grid[name] = rng.choice((-1, 0, 1, 2, 1000, 2**31, 2**62))
    tables = {
        f"table_{side}": _tensor(
            rng, (rng.choice((1, heads)), *_table(side, channels, buckets)), wrong=0.15
        )
        for side in "qkv"
        if rng.random() < 0.7
    }
    options: dict[str, Any] = {"scale": rng.choice((None, 0.5, 0.0, float("nan")))}
    if rng.random() < 0.3:
        options["dropout_p"] = rng.choice((0.0, -1.0, 1.0, 2.0, float("nan")))
    if rng.random() < 0.3:
        options["key_padding"] = _tensor(rng, (1, tokens), wrong=0.5) > 0
    results = [
        rpe_ops.attention(q, k, v, GridBuckets(**grid), **tables, **options, implementation=name)
        for name in _implementations(rng)
    ]
    # Each implementation has its own order of the random numbers of dropout.
    _compare(*(results if not options.get("dropout_p") else results[:1]))


def _table(side: str, channels: int, buckets: int) -> tuple[int, int]:
    """Return the shape of the table of a side."""
    return (buckets, channels) if side == "v" else (channels, buckets)


def _raw(rng: random.Random) -> None:
    """Call an operator of the C++ library with nothing in between."""
    operators = torch.ops.rpe_ops_cpp
    if rng.random() < 0.5:
        operators.gather(_tensor(rng, (2, 3, 5), wrong=0.5), _ids(rng, (3, 4), wrong=0.5))
    else:
        number = rng.choice((5, 5, 0, -1, 1, 2**31, 2**62))
        operators.bucket_sum(
            _tensor(rng, (2, 3, 4), wrong=0.5), _ids(rng, (3, 4), wrong=0.5), number
        )


def _configuration(rng: random.Random) -> None:
    """Build the buckets of a configuration with absurd numbers."""
    method = rng.choice(("euc", "quant", "cross", "product", "", None, "x" * 100))
    ratio = rng.choice((1.9, 2.0, 0.0, -1.0, 1e-300, 20.0, 1e3, 1e300, float("nan"), None, "1"))
    RPEConfig(method=method, ratio=ratio, on=rng.choice(("k", "qkv", "", "kk", 1, None)))


def _implementations(rng: random.Random) -> tuple[str, ...]:
    """Return the names of the implementations to compare."""
    return rng.choice((("reference", "cpp"), ("auto", "reference"), ("cpp",), ("", "auto")))


def _tensor(rng: random.Random, shape: tuple[int, ...], wrong: float = 0.3) -> Any:
    """Return a float32 tensor; with the probability `wrong`, something else."""
    value = torch.randn(shape)
    if rng.random() > wrong:
        return value
    sizes = list(shape)
    sizes[rng.randrange(len(sizes))] = rng.choice((0, 1, 2, 9))
    others = [
        *(value.to(rng.choice(_DTYPES)), torch.randn(sizes), value[0], value[None], value[..., 0]),
        *(value.transpose(-1, -2), value.mul(float("nan")), value.to("meta"), value.to_sparse()),
        *(torch.zeros(1).expand(2**20, *shape), torch.tensor(1.0)),
    ]
    return rng.choice(others)


def _ids(
    rng: random.Random,
    shape: tuple[int, ...],
    wrong: float = 0.3,
    dtype: torch.dtype = torch.int64,
) -> Any:
    """Return bucket ids in [0, 5); with the probability `wrong`, something else."""
    value = torch.randint(0, 5, shape, dtype=dtype)
    if rng.random() > wrong:
        return value
    if rng.random() < 0.5:
        value.view(-1)[rng.randrange(value.numel())] = rng.choice((-1, 5, 2**31 - 1, -(2**31)))
        return value
    others = (value.to(rng.choice(_DTYPES)), value[:1], value[None], value[:, :0], value.T)
    return rng.choice(others)


def _compare(first: Tensor, *others: Tensor) -> None:
    """Check that all results are equal up to rounding."""
    for other in others:
        torch.testing.assert_close(first, other, rtol=2e-2, atol=2e-2, equal_nan=True)
