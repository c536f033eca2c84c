"""The encodings: a table of learned vectors or scalars, looked up by bucket.

    contextual, on q or k:  r[b,h,i,j] = x[b,h,i,:] · T[h,:,bucket(i,j)]
    bias, on q or k:        r[h,i,j]   = T[h,bucket(i,j)]
    contextual, on v:       o[b,h,i,:] = Σ_j a[b,h,i,j] · T[h,bucket(i,j),:]

Source: iRPE (Wu et al., ICCV 2021). The product with the table comes before the gather (after
the bucket sum on v), so nothing of size L × L × d is ever built and the cost is O(L·K·d).
"""

import math

import torch
from torch import Tensor, nn

import rpe_ops
from irpe_core.buckets import BUCKET_CACHE
from irpe_core.config import RPEConfig

__all__ = ["ContextualRPE", "BiasRPE", "ValueRPE", "CrossRPE", "build_rpe", "resolve_grid"]


def resolve_grid(
    num_tokens: int, skip: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width of the grid behind `num_tokens` tokens; a grid is never guessed.

    Raises:
        ValueError: The tokens do not form the grid given or, without one, a square.
    """
    grid_tokens = num_tokens - skip
    if (height is None) != (width is None):
        raise ValueError(f"give both height and width or neither, got {height} and {width}")
    if height is None:
        # Not math.isqrt: torch.compile cannot take it of a symbolic length.
        side = int(math.sqrt(max(grid_tokens, 0)))
        if side * side != grid_tokens or side == 0:
            raise ValueError(
                f"{num_tokens} tokens without {skip} skipped ones do not form a square: "
                "pass height and width"
            )
        return side, side
    if height < 1 or width < 1 or height * width != grid_tokens:
        raise ValueError(
            f"a grid of {height} x {width} and {skip} skipped tokens make "
            f"{height * width + skip} tokens, got {num_tokens}"
        )
    return height, width


class _TableRPE(nn.Module):
    """What the three encodings share: configuration, sharing of heads, bucket table, start at 0.

    Args:
        config: The encoding.
        head_dim: Channels of one head, `d`.
        num_heads: Heads; the table holds one of them when `config.shared_head`.
        axis: Which of the tables of `cross` this is, 0 rows or 1 columns; 0 for the others.
    """

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, axis: int = 0) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.table_heads = 1 if config.shared_head else num_heads
        self.axis = axis
        # Of the operators; see `irpe_core.set_implementation`.
        self.implementation = "auto"

    def _index(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        grid = resolve_grid(x.shape[-2], self.config.skip, height, width)
        return BUCKET_CACHE.get(self.config, *grid, self.axis, like=x)

    def _apply_table(self, x: Tensor, table: Tensor) -> Tensor:
        """`x (B, H, L, n) @ table (Hs, n, m)`; a shared table is one flat matrix product."""
        return x @ (table[0] if self.table_heads == 1 else table)

    def reset_parameters(self) -> None:
        """Start at zero, so that a fresh encoding changes nothing."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{c.method}, ratio={c.ratio}, buckets={c.num_buckets}, heads={self.table_heads}, "
            f"head_dim={self.head_dim}, skip={c.skip}"
        )


class ContextualRPE(_TableRPE):
    """Contextual encoding on queries or keys: `r[b,h,i,j] = x[b,h,i,:] · T[h,:,bucket(i,j)]`."""

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, axis: int = 0) -> None:
        super().__init__(config, head_dim, num_heads, axis)
        shape = (self.table_heads, head_dim, config.num_buckets)
        self.lookup_table_weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Encode queries (or keys, whose result is then transposed).

        Args:
            x: `(B, H, L, d)`.
            height: Rows of the grid; with `width` None, the tokens must form a square.
            width: Columns of the grid.

        Returns:
            `(B, H, L, L)`, to be added to the attention logits.

        Raises:
            ValueError: The tokens do not form the grid.
        """
        index = self._index(x, height, width)
        lookup = self._apply_table(x, self.lookup_table_weight)
        return rpe_ops.gather(lookup, index, implementation=self.implementation, check_bounds=False)

    def table(self) -> Tensor:
        """What `rpe_ops.attention` reads, `(Hs, d, K)`."""
        return self.lookup_table_weight


class BiasRPE(_TableRPE):
    """Bias encoding on queries or keys: `r[h,i,j] = T[h,bucket(i,j)]`, the same for every input."""

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, axis: int = 0) -> None:
        super().__init__(config, head_dim, num_heads, axis)
        self.lookup_table_bias = nn.Parameter(torch.empty(self.table_heads, config.num_buckets))
        self.reset_parameters()

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Encode positions; of `x (B, H, L, d)` only the length matters.

        Returns:
            `(1, Hs, L, L)`, to be added to the attention logits.

        Raises:
            ValueError: The tokens do not form the grid.
        """
        index = self._index(x, height, width)
        lookup = self.lookup_table_bias[None, :, None].expand(-1, -1, x.shape[-2], -1)
        return rpe_ops.gather(lookup, index, implementation=self.implementation, check_bounds=False)

    def table(self) -> Tensor:
        """What `rpe_ops.attention` reads, `(Hs, K)`."""
        return self.lookup_table_bias


class ValueRPE(_TableRPE):
    """Contextual encoding on values: `o[b,h,i,:] = Σ_j a[b,h,i,j] · T[h,bucket(i,j),:]`."""

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, axis: int = 0) -> None:
        super().__init__(config, head_dim, num_heads, axis)
        shape = (self.table_heads, config.num_buckets, head_dim)
        self.lookup_table_weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def forward(self, attn: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Encode attention weights.

        Args:
            attn: `(B, H, L, L)`, after softmax and dropout.
            height: Rows of the grid; with `width` None, the tokens must form a square.
            width: Columns of the grid.

        Returns:
            `(B, H, L, d)`, to be added to the attention's output.

        Raises:
            ValueError: The tokens do not form the grid.
        """
        index = self._index(attn, height, width)
        sums = rpe_ops.bucket_sum(
            attn,
            index,
            self.config.num_buckets,
            implementation=self.implementation,
            check_bounds=False,
        )
        return self._apply_table(sums, self.lookup_table_weight)

    def table(self) -> Tensor:
        """What `rpe_ops.attention` reads, `(Hs, K, d)`."""
        return self.lookup_table_weight


class CrossRPE(nn.Module):
    """The Cross method: one encoding of the rows and one of the columns, added."""

    def __init__(
        self, encoding: type[_TableRPE], config: RPEConfig, head_dim: int, num_heads: int
    ) -> None:
        super().__init__()
        self.config = config
        self.implementation = "auto"
        self.rp_rows = encoding(config, head_dim, num_heads, axis=0)
        self.rp_cols = encoding(config, head_dim, num_heads, axis=1)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Encode as the class given does; shapes and errors are its own."""
        return self.rp_rows(x, height, width) + self.rp_cols(x, height, width)

    def table(self) -> Tensor:
        """Both tables beside each other along the buckets: what `rpe_ops.attention` reads."""
        buckets = 1 if isinstance(self.rp_rows, ValueRPE) else -1
        return torch.cat((self.rp_rows.table(), self.rp_cols.table()), buckets)


def build_rpe(
    config: RPEConfig | None, head_dim: int, num_heads: int
) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
    """Modules for queries, keys and values, None where the configuration has no encoding.

    `rpe_k` is called on the scaled queries, `rpe_q` on the scaled keys and its result transposed,
    `rpe_v` on the attention weights; `irpe_core.rpe_attention` does all of it.

    Args:
        config: The encoding; None gives three times None.
        head_dim: Channels of one head.
        num_heads: Number of heads.

    Returns:
        `(rpe_q, rpe_k, rpe_v)`.
    """
    if config is None:
        return None, None, None

    def build(letter: str) -> nn.Module | None:
        if letter not in config.rpe_on:
            return None
        if letter == "v":
            encoding = ValueRPE
        else:
            encoding = ContextualRPE if config.mode == "ctx" else BiasRPE
        if config.method == "cross":
            return CrossRPE(encoding, config, head_dim, num_heads)
        return encoding(config, head_dim, num_heads)

    return build("q"), build("k"), build("v")
