"""Relative position → bucket, and the bounded cache of bucket tables.

With `(dr, dc) = position(i) - position(j)` on a row-major grid and the piecewise index g
(iRPE paper, Eq. 18; rounding half to even in float32, `B = int(beta)`):

    euc      g(round(sqrt(dr² + dc²))) + B
    quant    g(dr² + dc²) + B
    cross    g(dr) + B  and  g(dc) + B, two tables
    product  (g(dr) + B)·(2B + 1) + g(dc) + B

g is constant beyond gamma and is only ever taken of whole numbers, so it is evaluated once per
ratio into a short table of integers. No float rounding of another device or compiler can then
move a bucket, and the work per grid is integer arithmetic.
"""

import functools
import math
import threading
from collections import OrderedDict

import torch
from torch import Tensor

from irpe_core.config import RPEConfig

__all__ = ["piecewise_index", "bucket_ids", "BucketCache", "BUCKET_CACHE"]


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
def _piecewise_table(ratio: float) -> tuple[int, ...]:
    """g(0), g(1), … up to the first distance from which on it is constant."""
    with torch.inference_mode(False):
        distances = torch.arange(math.ceil(8 * ratio) + 2, device="cpu")
        return tuple(piecewise_index(distances, ratio, 2 * ratio, 8 * ratio).tolist())


def _index_of_integers(x: Tensor, ratio: float) -> Tensor:
    """`piecewise_index` of whole numbers, by table."""
    table = torch.tensor(_piecewise_table(ratio), device=x.device)
    return x.sign() * table[x.abs().clamp(max=len(table) - 1)]


def _with_skip(ids: Tensor, skip: int, extra_bucket: int) -> Tensor:
    """Put `skip` rows and columns of the extra bucket before the grid's pairs."""
    return torch.nn.functional.pad(ids, (skip, 0, skip, 0), value=extra_bucket) if skip else ids


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
    config = RPEConfig(ratio=ratio, method=method, skip=skip)
    if height < 1 or width < 1:
        raise ValueError(f"the grid must be at least 1 x 1, got {height} x {width}")
    rows, cols = (torch.arange(n, device=device or "cpu") for n in (height, width))
    # Differences broadcast over (query row, query column, key row, key column).
    dr = (rows[:, None] - rows[None, :])[:, None, :, None]
    dc = (cols[:, None] - cols[None, :])[None, :, None, :]
    grid = (height, width, height, width)
    tokens = height * width
    offset = config.side // 2

    def finish(ids: Tensor) -> Tensor:
        ids = ids.expand(grid).reshape(tokens, tokens)
        return _with_skip(ids, skip, config.num_buckets - 1)

    if method == "euc":
        distance = (dr * dr + dc * dc).float().sqrt().round().long()
        return finish(_index_of_integers(distance, ratio) + offset)
    if method == "quant":
        return finish(_index_of_integers(dr * dr + dc * dc, ratio) + offset)
    row_ids = _index_of_integers(dr, ratio) + offset
    col_ids = _index_of_integers(dc, ratio) + offset
    if method == "cross":
        return finish(row_ids), finish(col_ids)
    return finish(row_ids * config.side + col_ids)


class BucketCache:
    """Least-recently-used bucket tables, bounded in bytes, shared by all layers of a process.

    Args:
        max_bytes: Most that is kept; a table larger than that is computed at every call.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self.max_bytes = max_bytes
        self._tables: OrderedDict[tuple, tuple[Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(t.nbytes for tables in self._tables.values() for t in tables)

    def __len__(self) -> int:
        return len(self._tables)

    def clear(self) -> None:
        """Free every table."""
        with self._lock:
            self._tables.clear()

    def get(
        self, config: RPEConfig, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Tables of a grid: one `(L, L)` int64 tensor, two for `cross`. Not to be written to."""
        # While tracing, sizes may be symbolic and tensors fake: nothing of that may be kept.
        if torch.compiler.is_compiling():
            return self._compute(config, height, width, device)
        key = (config.method, config.ratio, config.skip, height, width, device)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        # A table made in inference mode could not serve a later training step.
        with torch.inference_mode(False):
            tables = self._compute(config, height, width, device)
        if all(type(table) is Tensor for table in tables):
            with self._lock:
                self._tables[key] = tables
                while self._tables and self.nbytes > self.max_bytes:
                    self._tables.popitem(last=False)
        return tables

    @staticmethod
    def _compute(
        config: RPEConfig, height: int, width: int, device: torch.device
    ) -> tuple[Tensor, ...]:
        ids = bucket_ids(config.method, height, width, config.ratio, config.skip, device=device)
        return ids if isinstance(ids, tuple) else (ids,)


BUCKET_CACHE = BucketCache()
