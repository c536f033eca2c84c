"""Buckets of all pairs of tokens on a grid, without a table of pairs.

A bucket depends on the difference of two positions alone, so two short tables along the axes hold
everything. With `dr = row(i) - row(j)`, `dc = column(i) - column(j)` and terms `t` (one, or two for
the Cross method, whose encodings are added):

    bucket_t(i, j) = t·K + row_base[t, dr + h - 1] + local[t, dr + h - 1 or 0, dc + w - 1]

and `t·K + K - 1` for every pair with one of the `skip` tokens before the grid. Where the second
table has a single row, the buckets are separable: whole runs of grid rows share one row of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GridBuckets"]


class GridBuckets(NamedTuple):
    """Buckets of the pairs of `skip + height·width` tokens, the grid row by row.

    Attributes:
        row_base: `(T, 2·height - 1)` int32, rising along the rows where buckets are separable.
        local: `(T, 1, 2·width - 1)` int32, or `(T, 2·height - 1, 2·width - 1)` where they are not.
        height: Rows of the grid.
        width: Columns of the grid.
        skip: Tokens before the grid.
        num_buckets: Buckets of one term, `K`, the extra one of skipped tokens included.
        run_width: Values of `local` lie in `[0, run_width)`.
    """

    row_base: Tensor
    local: Tensor
    height: int
    width: int
    skip: int
    num_buckets: int
    run_width: int

    @property
    def num_tokens(self) -> int:
        """Tokens in all, `L`."""
        return self.skip + self.height * self.width

    @property
    def num_lookups(self) -> int:
        """Values of a lookup per token, `T·K`."""
        return self.row_base.shape[0] * self.num_buckets

    def bucket_ids(self) -> Tensor:
        """The buckets written out, `(T, L, L)` int64; rows are queries."""
        device = self.row_base.device
        rows, cols = (torch.arange(n, device=device) for n in (self.height, self.width))
        dr = (rows[:, None] - rows[None, :] + self.height - 1)[:, None, :, None]
        dc = (cols[:, None] - cols[None, :] + self.width - 1)[None, :, None, :]
        local = self.local[:, dr if self.local.shape[1] > 1 else torch.zeros_like(dr), dc]
        index = self.row_base[:, dr] + local
        grid = self.height * self.width
        index = index.expand(-1, self.height, self.width, self.height, self.width)
        index = index.reshape(-1, grid, grid).long()
        # Skipped tokens come first, and every pair with one has the last bucket.
        index = torch.nn.functional.pad(
            index, (self.skip, 0, self.skip, 0), value=self.num_buckets - 1
        )
        terms = torch.arange(len(index), device=device)
        return index + self.num_buckets * terms[:, None, None]
