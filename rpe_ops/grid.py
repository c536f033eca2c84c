"""Buckets of all pairs of tokens on a grid, without an L × L tensor of bucket ids.

The bucket of a pair depends only on the difference of two positions. So two short tensors along the
axes of the grid, `row_base` and `local`, are enough. Together they are called the *axis offsets*.
With `dr = row(i) - row(j)`, `dc = column(i) - column(j)`, the height `h`, the width `w` and the
term `t` (0, or 0 and 1 for the cross method, whose two encodings are added):

    bucket_t(i, j) = t·K + row_base[t, dr + h - 1] + local[t, dr + h - 1 or 0, dc + w - 1]

and `t·K + K - 1` for every pair with one of the `skip` tokens before the grid. If `local` has a
single row, the buckets are separable: they are a function of `dr` plus a function of `dc`.
Notation: rpe_ops/README.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GridBuckets"]


class GridBuckets(NamedTuple):
    """Buckets of the pairs of `skip + height·width` tokens, the grid row by row.

    Attributes:
        row_base: First part of the axis offsets, `(terms, 2·height - 1)` int32. Its values do not
            decrease with `dr` if the buckets are separable.
        local: Second part of the axis offsets, `(terms, 1, 2·width - 1)` int32, or
            `(terms, 2·height - 1, 2·width - 1)` if the buckets are not separable.
        height: Rows of the grid.
        width: Columns of the grid.
        skip: Tokens before the grid, such as the class token.
        num_buckets: Buckets of one term, `K`, including the extra one of skipped tokens.
        run_width: Exclusive upper bound of the values of `local`, which are at least 0.
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
        """Number of tokens, `L`."""
        return self.skip + self.height * self.width

    @property
    def num_lookups(self) -> int:
        """Values of a lookup per token, `terms·K`."""
        return self.row_base.shape[0] * self.num_buckets

    def bucket_ids(self) -> Tensor:
        """Return the bucket ids, `(terms, L, L)` int64; rows are queries.

        The ids of term `t` start at `t·K`.
        """
        device = self.row_base.device
        rows, cols = (torch.arange(n, device=device) for n in (self.height, self.width))
        dr = (rows[:, None] - rows[None, :] + self.height - 1)[:, None, :, None]
        dc = (cols[:, None] - cols[None, :] + self.width - 1)[None, :, None, :]
        local = self.local[:, dr if self.local.shape[1] > 1 else torch.zeros_like(dr), dc]
        ids = self.row_base[:, dr] + local
        grid = self.height * self.width
        ids = ids.expand(-1, self.height, self.width, self.height, self.width)
        ids = ids.reshape(-1, grid, grid).long()
        # Skipped tokens come first, and every pair with one has the last bucket.
        ids = torch.nn.functional.pad(ids, (self.skip, 0, self.skip, 0), value=self.num_buckets - 1)
        terms = torch.arange(len(ids), device=device)
        return ids + self.num_buckets * terms[:, None, None]
