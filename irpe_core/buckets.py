"""Relative position → bucket, and the bounded cache of bucket tables.

With `(dr, dc) = position(i) - position(j)` on a row-major grid and the piecewise index g
(iRPE paper, Eq. 18; rounding half to even in float32, `B = int(beta)`):

    euc      g(round(sqrt(dr² + dc²))) + B
    quant    g(dr² + dc²) + B
    cross    g(dr) + B  and  g(dc) + B, two tables
    product  (g(dr) + B)·(2B + 1) + g(dc) + B

g is constant beyond gamma and is only ever taken of whole numbers, so it is evaluated once per
ratio, on the CPU, into the few distances where it steps. No float rounding of another device or
compiler can then move a bucket, and the work per grid is integer arithmetic.
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
from rpe_ops import GridBuckets

__all__ = ["piecewise_index", "bucket_ids", "grid_buckets", "BucketCache", "BUCKET_CACHE"]


def piecewise_index(x: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Map relative positions to indices: exact near zero, logarithmic and bounded beyond.

        g(x) = round(x)                                                      where |x| <= alpha
        g(x) = sign(x)·trunc(min(beta, round(alpha + ln(|x|/alpha)/ln(gamma/alpha)·(beta-alpha))))

    Args:
        x: Relative positions, any shape, any real dtype.
        alpha: End of the exact part, > 0.
        beta: Largest absolute index, reached at `gamma`.
        gamma: Where the logarithmic part ends, > alpha.

    Returns:
        int64 indices of the same shape, within `[-int(beta), int(beta)]`.

    Raises:
        ValueError: Unless `0 < alpha < gamma` and `beta > 0`.
    """
    if not 0 < alpha < gamma or beta <= 0:
        raise ValueError(
            "piecewise_index needs 0 < alpha < gamma and beta > 0, "
            f"got alpha={alpha}, beta={beta}, gamma={gamma}"
        )
    x = x.to(torch.float32)
    distance = x.abs()
    # The clamp keeps the logarithm finite where the exact part is taken anyway.
    growth = torch.log(distance.clamp(min=alpha) / alpha) / math.log(gamma / alpha)
    far = (alpha + growth * (beta - alpha)).round().clamp(max=beta).trunc()
    return torch.where(distance <= alpha, x.round(), x.sign() * far).long()


@functools.lru_cache(maxsize=64)
def piecewise_steps(ratio: float) -> tuple[int, ...]:
    """Distances at which g grows by one: `g(x) = sign(x)·#{steps <= |x|}` for whole numbers x."""
    with torch.inference_mode(False):
        distances = torch.arange(math.ceil(8 * ratio) + 2, device="cpu")
        table = piecewise_index(distances, ratio, 2 * ratio, 8 * ratio).tolist()
    return tuple(x for x in range(1, len(table)) for _ in range(table[x] - table[x - 1]))


def _index_of_integers(x: Tensor, ratio: float, largest: int) -> Tensor:
    """`piecewise_index` of whole numbers up to `largest` in size, without leaving the device."""
    distance = x.abs()
    index = torch.zeros_like(x)
    for step in piecewise_steps(ratio):
        # A symbolic size may become any: all steps are needed.
        if isinstance(largest, int) and step > largest:
            break
        index = index + (distance >= step)
    return x.sign() * index


# An operator, so that tracers (torch.compile, export, FakeTensorMode) see one opaque node with the
# right shape: sizes may be symbolic, and g is never traced.
torch.library.define(
    "irpe_core::bucket_table",
    "(str method, int axis, SymInt height, SymInt width, float ratio, SymInt skip, Device device)"
    " -> Tensor",
)


def compute_table(
    method: str,
    axis: int,
    height: int,
    width: int,
    ratio: float,
    skip: int,
    device: torch.device,
) -> Tensor:
    """One `(L, L)` table, computed anew; `axis` chooses rows (0) or columns (1) for `cross`."""
    config = RPEConfig(ratio=ratio, method=method, skip=skip)
    buckets = grid_buckets(config, height, width, device)
    return buckets.bucket_ids()[axis] - axis * config.num_buckets


torch.library.impl("irpe_core::bucket_table", "default", compute_table)


@torch.library.register_fake("irpe_core::bucket_table")
def _fake_table(method, axis, height, width, ratio, skip, device) -> Tensor:
    tokens = skip + height * width
    return torch.empty(tokens, tokens, dtype=torch.int64, device=device)


torch.library.define(
    "irpe_core::grid_tables",
    "(str method, SymInt height, SymInt width, float ratio, Device device)"
    " -> (Tensor row_base, Tensor local)",
)


def compute_grid_tables(
    method: str, height: int, width: int, ratio: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The tables of `rpe_ops.GridBuckets`, computed anew."""
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


torch.library.impl("irpe_core::grid_tables", "default", compute_grid_tables)


@torch.library.register_fake("irpe_core::grid_tables")
def _fake_grid_tables(method, height, width, ratio, device) -> tuple[Tensor, Tensor]:
    terms = 2 if method == "cross" else 1
    rows = 2 * height - 1 if method in ("euc", "quant") else 1
    empty = functools.partial(torch.empty, dtype=torch.int32, device=device)
    return empty(terms, 2 * height - 1), empty(terms, rows, 2 * width - 1)


_bucket_table = torch.ops.irpe_core.bucket_table.default
_grid_tables = torch.ops.irpe_core.grid_tables.default


def _grid_buckets(
    config: RPEConfig, height: int, width: int, tables: tuple[Tensor, Tensor]
) -> GridBuckets:
    return GridBuckets(*tables, height, width, config.skip, config.num_buckets, config.side)


def grid_buckets(
    config: RPEConfig, height: int, width: int, device: torch.device | str | None = None
) -> GridBuckets:
    """The buckets of a grid as `rpe_ops.attention` takes them, computed anew; 1 x 1 or larger."""
    device = torch.device(device or "cpu")
    tables = _grid_tables(config.method, height, width, config.ratio, device)
    return _grid_buckets(config, height, width, tables)


def bucket_ids(
    method: str,
    height: int,
    width: int,
    ratio: float,
    skip: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Bucket of every pair of tokens, computed anew.

    Args:
        method: `euc`, `quant`, `cross` or `product`.
        height: Rows of the grid, >= 1.
        width: Columns of the grid, >= 1.
        ratio: Scale of the piecewise index, > 0.
        skip: Tokens before the grid; every pair with one gets the extra, last bucket.
        device: Where to compute; default the CPU.

    Returns:
        `(L, L)` int64 with `L = skip + height·width`, rows are queries; for `cross` the pair
        (row buckets, column buckets).

    Raises:
        ValueError: Names the argument, its value and what is allowed.
    """
    RPEConfig(ratio=ratio, method=method, skip=skip)
    if height < 1 or width < 1:
        raise ValueError(f"the grid must be at least 1 x 1, got {height} x {width}")
    device = torch.device(device or "cpu")
    tables = [
        _bucket_table(method, axis, height, width, ratio, skip, device)
        for axis in range(2 if method == "cross" else 1)
    ]
    return (tables[0], tables[1]) if method == "cross" else tables[0]


class BucketCache:
    """Least-recently-used bucket tables, bounded in bytes, shared by all layers of a process.

    Args:
        max_bytes: Most that is kept; a table larger than that is computed at every call.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self.max_bytes = max_bytes
        self._tables: OrderedDict[tuple, Any] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._tables)

    def clear(self) -> None:
        """Free every table."""
        with self._lock:
            self._tables.clear()
            self._nbytes = 0

    def get(self, config: RPEConfig, height: int, width: int, axis: int, like: Tensor) -> Tensor:
        """The `(L, L)` int64 table of a grid on the device of `like`. Not to be written to.

        Args:
            config: The encoding.
            height: Rows of the grid.
            width: Columns of the grid.
            axis: 0 for the rows, 1 for the columns of `cross`; 0 for the other methods.
            like: A tensor of the same kind as the table: for a fake one the table is fake.
        """
        arguments = (config.method, axis, height, width, config.ratio, config.skip, like.device)
        return self._get(arguments, lambda: _bucket_table(*arguments), like)

    def grid(self, config: RPEConfig, height: int, width: int, like: Tensor) -> GridBuckets:
        """The buckets of a grid as `rpe_ops.attention` takes them; arguments as in `get`."""
        arguments = (config.method, height, width, config.ratio, like.device)
        tables = self._get(arguments, lambda: _grid_tables(*arguments), like)
        return _grid_buckets(config, height, width, tables)

    def _get(self, key: tuple, compute: Callable[[], Any], like: Tensor) -> Any:
        # While tracing, sizes may be symbolic and tensors fake: nothing of that may be kept.
        if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
            return compute()
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        # A table made in inference mode could not serve a later training step.
        with torch.inference_mode(False):
            table = compute()
        real = all(type(tensor) is Tensor for tensor in _tensors(table))
        if real and _nbytes(table) <= self.max_bytes:
            self._keep(key, table)
        return table

    def _keep(self, key: tuple, table: Any) -> None:
        with self._lock:
            if key in self._tables:
                return
            while self._nbytes + _nbytes(table) > self.max_bytes:
                _, oldest = self._tables.popitem(last=False)
                self._nbytes -= _nbytes(oldest)
            self._tables[key] = table
            self._nbytes += _nbytes(table)


def _tensors(table: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (table,) if isinstance(table, Tensor) else table


def _nbytes(table: Tensor | tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in _tensors(table))


BUCKET_CACHE = BucketCache()
