"""Bucket ids of relative positions, and a bounded cache for them.

With `(dr, dc) = position(i) - position(j)` on a row-major grid, the piecewise index g
(iRPE paper, Eq. 18; rounds half to even in float32) and `bound = int(beta)`, a pair is in bucket

    euc      g(round(sqrt(dr² + dc²))) + bound
    quant    g(dr² + dc²) + bound
    cross    g(dr) + bound  for the rows  and  g(dc) + bound  for the columns: two terms
    product  (g(dr) + bound)·(2·bound + 1) + g(dc) + bound

All arguments of g are whole numbers, and g is constant beyond gamma. It is therefore evaluated once
per ratio, on the CPU, to find the distances at which it grows. Everything else is integer
arithmetic, so the result does not depend on the device or the compiler.

Bucket ids are the (L, L) integers. Axis offsets are the short integer tensors along the two axes
from which `rpe_ops.GridBuckets` makes them.
"""

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from irpe_core.config import RPEConfig
from irpe_core.tracing import is_recording, not_recorded
from rpe_ops import GridBuckets

__all__ = ["piecewise_index", "bucket_ids", "grid_buckets", "BucketCache", "BUCKET_CACHE"]


def piecewise_index(x: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Map relative positions to indices, exactly near zero and logarithmically farther away.

        g(x) = round(x)                                                      where |x| <= alpha
        g(x) = sign(x)·trunc(min(beta, round(alpha + ln(|x|/alpha)/ln(gamma/alpha)·(beta-alpha))))

    Args:
        x: Relative positions, of any shape and any real dtype.
        alpha: End of the exact part; > 0.
        beta: Largest absolute index, reached at `gamma`; > 0.
        gamma: End of the logarithmic part; > alpha.

    Returns:
        int64 indices of the same shape, within `[-int(beta), int(beta)]`.

    Raises:
        ValueError: `0 < alpha < gamma` or `beta > 0` is violated.
    """
    if not 0 < alpha < gamma or beta <= 0:
        raise ValueError(
            "alpha, beta and gamma must satisfy 0 < alpha < gamma and beta > 0, "
            f"got alpha={alpha}, beta={beta}, gamma={gamma}"
        )
    x = x.to(torch.float32)
    distance = x.abs()
    # The clamp keeps the logarithm finite for distances in the exact part.
    growth = torch.log(distance.clamp(min=alpha) / alpha) / math.log(gamma / alpha)
    far = (alpha + growth * (beta - alpha)).round().clamp(max=beta).trunc()
    return torch.where(distance <= alpha, x.round(), x.sign() * far).long()


@functools.lru_cache(maxsize=64)
def piecewise_steps(ratio: float) -> tuple[int, ...]:
    """Return the distances where g grows by one: `g(x) = sign(x)·#{steps <= |x|}`, x whole."""
    with torch.inference_mode(False):
        distances = torch.arange(math.ceil(8 * ratio) + 2, device="cpu")
        index = piecewise_index(distances, ratio, 2 * ratio, 8 * ratio).tolist()
    return tuple(x for x in range(1, len(index)) for _ in range(index[x] - index[x - 1]))


def _index_of_integers(x: Tensor, ratio: float, largest: int) -> Tensor:
    """Compute `piecewise_index` of whole numbers with `|x| <= largest`, on the device of `x`."""
    distance = x.abs()
    index = torch.zeros_like(x)
    for step in piecewise_steps(ratio):
        # While tracing, `largest` may be symbolic. Its value is unknown then: keep all steps.
        if isinstance(largest, int) and step > largest:
            break
        index = index + (distance >= step)
    return x.sign() * index


# Bucket ids and axis offsets are operators. torch.compile, torch.export and FakeTensorMode then see
# one node with the right shape, also for symbolic sizes, and do not trace g.
torch.library.define(
    "irpe_core::bucket_ids",
    "(str method, int axis, SymInt height, SymInt width, float ratio, SymInt skip, Device device)"
    " -> Tensor",
)


def compute_bucket_ids(
    method: str,
    axis: int,
    height: int,
    width: int,
    ratio: float,
    skip: int,
    device: torch.device,
) -> Tensor:
    """Compute the `(L, L)` bucket ids of one term; `axis` 1 is the columns of `cross`."""
    config = RPEConfig(ratio=ratio, method=method, skip=skip)
    buckets = grid_buckets(config, height, width, device)
    # GridBuckets numbers the buckets of the columns after those of the rows.
    return buckets.bucket_ids()[axis] - axis * config.num_buckets


torch.library.impl("irpe_core::bucket_ids", "default", compute_bucket_ids)


@torch.library.register_fake("irpe_core::bucket_ids")
def _fake_bucket_ids(method, axis, height, width, ratio, skip, device) -> Tensor:
    """Return an empty result of the operator `bucket_ids`, for tracing."""
    tokens = skip + height * width
    return torch.empty(tokens, tokens, dtype=torch.int64, device=device)


torch.library.define(
    "irpe_core::axis_offsets",
    "(str method, SymInt height, SymInt width, float ratio, Device device)"
    " -> (Tensor row_base, Tensor local)",
)


def compute_axis_offsets(
    method: str, height: int, width: int, ratio: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute `row_base` and `local` of `rpe_ops.GridBuckets`."""
    config = RPEConfig(ratio=ratio, method=method)
    dr, dc = (torch.arange(1 - n, n, device=device) for n in (height, width))
    if method in ("euc", "quant"):
        distance = dr[:, None] ** 2 + dc[None, :] ** 2
        if method == "euc":
            distance = distance.float().sqrt().round().long()
        largest = (height - 1) ** 2 + (width - 1) ** 2
        local = _index_of_integers(distance, ratio, largest) + config.side // 2
        row_base = torch.zeros_like(dr)
    else:
        rows = _index_of_integers(dr, ratio, height - 1) + config.side // 2
        cols = _index_of_integers(dc, ratio, width - 1) + config.side // 2
        none = torch.zeros_like
        if method == "product":
            row_base, local = rows * config.side, cols
        else:
            row_base, local = torch.stack((rows, none(rows))), torch.stack((none(cols), cols))
    terms = 2 if method == "cross" else 1
    return row_base.view(terms, -1).int(), local.view(terms, -1, 2 * width - 1).int()


torch.library.impl("irpe_core::axis_offsets", "default", compute_axis_offsets)


@torch.library.register_fake("irpe_core::axis_offsets")
def _fake_axis_offsets(method, height, width, ratio, device) -> tuple[Tensor, Tensor]:
    """Return an empty result of the operator `axis_offsets`, for tracing."""
    terms = 2 if method == "cross" else 1
    rows = 2 * height - 1 if method in ("euc", "quant") else 1
    empty = functools.partial(torch.empty, dtype=torch.int32, device=device)
    return empty(terms, 2 * height - 1), empty(terms, rows, 2 * width - 1)


_bucket_ids_op = torch.ops.irpe_core.bucket_ids.default
_axis_offsets_op = torch.ops.irpe_core.axis_offsets.default


def grid_buckets(
    config: RPEConfig, height: int, width: int, device: torch.device | str | None = None
) -> GridBuckets:
    """Compute the buckets of a grid in the form that `rpe_ops.attention` accepts.

    Args:
        config: The encoding.
        height: Rows of the grid, >= 1.
        width: Columns of the grid, >= 1.
        device: Device of the axis offsets; default the CPU.
    """
    device = torch.device(device or "cpu")
    axis_offsets = _axis_offsets_op(config.method, height, width, config.ratio, device)
    return GridBuckets(*axis_offsets, height, width, config.skip, config.num_buckets, config.side)


def bucket_ids(
    method: str,
    height: int,
    width: int,
    ratio: float,
    skip: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the bucket of every pair of tokens.

    Args:
        method: `euc`, `quant`, `cross` or `product`.
        height: Rows of the grid, >= 1.
        width: Columns of the grid, >= 1.
        ratio: Scale of the piecewise index, > 0.
        skip: Number of tokens before the grid. Every pair with one of them is in the last bucket.
        device: Device of the result; default the CPU.

    Returns:
        `(L, L)` int64 with `L = skip + height·width`; rows are queries. For `cross` two of them,
        the buckets of the rows and those of the columns.

    Raises:
        ValueError: An argument has a value that is not allowed.
    """
    RPEConfig(ratio=ratio, method=method, skip=skip)
    if height < 1 or width < 1:
        raise ValueError(f"grid must be at least 1 x 1, got {height} x {width}")
    device = torch.device(device or "cpu")
    ids = [
        _bucket_ids_op(method, axis, height, width, ratio, skip, device)
        for axis in range(2 if method == "cross" else 1)
    ]
    return (ids[0], ids[1]) if method == "cross" else ids[0]


class BucketCache:
    """A cache of bucket ids and axis offsets, bounded in bytes; it drops the least recently used.

    All layers of a process share one, `BUCKET_CACHE`. Several threads may use it.

    Args:
        max_bytes: Upper bound in bytes. A larger entry is computed at every call and not kept.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple, Any] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Size of all entries in bytes."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def get(self, config: RPEConfig, height: int, width: int, axis: int, like: Tensor) -> Tensor:
        """Return the `(L, L)` int64 bucket ids of a grid. The caller must not write to them.

        Args:
            config: The encoding.
            height: Rows of the grid.
            width: Columns of the grid.
            axis: 0 for the rows and 1 for the columns of `cross`; 0 for the other methods.
            like: A tensor on the device of the result. For a fake tensor the result is fake too.
        """
        arguments = (config.method, axis, height, width, config.ratio, config.skip, like.device)
        return self._get(arguments, lambda: _bucket_ids_op(*arguments), like)

    def grid(self, config: RPEConfig, height: int, width: int, like: Tensor) -> GridBuckets:
        """Return the buckets of a grid for `rpe_ops.attention`; arguments as in `get`."""
        key = (config.method, height, width, config.ratio, config.skip, like.device)
        return self._get(key, lambda: grid_buckets(config, height, width, like.device), like)

    def _get(self, key: tuple, compute: Callable[[], Any], like: Tensor) -> Any:
        """Return the entry of a key; compute it if it is not in the cache."""
        if is_recording() and not any(isinstance(part, torch.SymInt) for part in key):
            with not_recorded():
                return self._get_real(key, compute)
        # While tracing, sizes may be symbolic and tensors fake. They must not enter the cache.
        if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
            return compute()
        return self._get_real(key, compute)

    def _get_real(self, key: tuple, compute: Callable[[], Any]) -> Any:
        """Return the entry of a key whose sizes are integers."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        # A tensor that is made in inference mode cannot be used in a later training step.
        with torch.inference_mode(False):
            entry = compute()
        real = all(type(tensor) is Tensor for tensor in _tensors(entry))
        if real and _nbytes(entry) <= self.max_bytes:
            self._keep(key, entry)
        return entry

    def _keep(self, key: tuple, entry: Any) -> None:
        """Add an entry, and drop the least recently used ones to make room for it."""
        with self._lock:
            if key in self._entries:
                return
            while self._nbytes + _nbytes(entry) > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._nbytes -= _nbytes(oldest)
            self._entries[key] = entry
            self._nbytes += _nbytes(entry)


def _tensors(entry: Tensor | GridBuckets) -> tuple[Tensor, ...]:
    """Return the tensors of an entry."""
    return (entry,) if isinstance(entry, Tensor) else (entry.row_base, entry.local)


def _nbytes(entry: Tensor | GridBuckets) -> int:
    """Return the size of an entry in bytes."""
    return sum(tensor.nbytes for tensor in _tensors(entry))


BUCKET_CACHE = BucketCache()
