"""The encodings: a table of learned vectors or scalars, one for each bucket.

    contextual, on q or k:  r[b,h,i,j] = x[b,h,i,:] · T[h,:,bucket(i,j)]
    bias, on q or k:        r[h,i,j]   = T[h,bucket(i,j)]
    contextual, on v:       o[b,h,i,:] = Σ_j a[b,h,i,j] · T[h,bucket(i,j),:]

Source: iRPE (Wu et al., ICCV 2021). On q and k the product with the table is computed before the
gather, and on v after the bucket sum. So no tensor of size L × L × d is built, and the products
cost O(L·K·d).
"""

import math

import torch
from torch import Tensor, nn

import rpe_ops
from irpe_core.buckets import BUCKET_CACHE
from irpe_core.config import RPEConfig
from irpe_core.tracing import is_recording, static_sizes
from rpe_ops import reference

__all__ = ["ContextualRPE", "BiasRPE", "ValueRPE", "CrossRPE", "build_rpe", "resolve_grid"]


def resolve_grid(
    num_tokens: int, skip: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """Return the grid of `num_tokens` tokens, the first `skip` of which are not on the grid.

    Args:
        num_tokens: Number of tokens, with the skipped ones.
        skip: Number of tokens before the grid.
        height: Rows of the grid.
        width: Columns of the grid. If both are None, the grid is a square.

    Returns:
        Height and width.

    Raises:
        ValueError: The tokens do not form this grid or, without one, a square; or only one of
            height and width is given.
    """
    grid_tokens = num_tokens - skip
    if (height is None) != (width is None):
        raise ValueError(
            f"height and width must both be given or both be None, got {height} and {width}"
        )
    if height is None:
        # torch.compile does not support math.isqrt of a symbolic length.
        side = int(math.sqrt(max(grid_tokens, 0)))
        if side * side != grid_tokens or side == 0:
            raise ValueError(
                f"{num_tokens} tokens without {skip} skipped ones do not form a square: "
                "pass height and width"
            )
        return side, side
    if height < 1 or width < 1 or height * width != grid_tokens:
        raise ValueError(
            f"number of tokens must be {height * width + skip} for a grid of {height} x {width} "
            f"and {skip} skipped tokens, got {num_tokens}"
        )
    return height, width


class _TableRPE(nn.Module):
    """Base class of the three encodings.

    Args:
        config: The encoding.
        head_dim: Channels of one head, `d`.
        num_heads: Number of heads. The table has one head only if `config.shared_head`.
        axis: The term of `cross`, 0 for rows or 1 for columns; 0 for the other methods.
    """

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, axis: int = 0) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.table_heads = 1 if config.shared_head else num_heads
        self.axis = axis
        # `irpe_core.set_implementation` changes it.
        self.implementation = "auto"

    def _bucket_ids(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        """Return the bucket ids of the tokens of `x`, from the cache."""
        (tokens,) = static_sizes(x.shape[-2:-1])
        grid = resolve_grid(tokens, self.config.skip, height, width)
        return BUCKET_CACHE.get(self.config, *grid, self.axis, like=x)

    def _apply_table(self, x: Tensor, table: Tensor) -> Tensor:
        """Multiply `x (B, H, L, n)` by `table (Hs, n, m)`; a shared table is one matrix product."""
        return x @ (table[0] if self.table_heads == 1 else table)

    def _gather(self, lookup: Tensor, ids: Tensor) -> Tensor:
        """Read the value of every pair's bucket."""
        if is_recording():
            return reference.gather(lookup, ids)
        return rpe_ops.gather(lookup, ids, implementation=self.implementation, check_bounds=False)

    def reset_parameters(self) -> None:
        """Set the table to zero, so that a new encoding does not change the outputs."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        """Return the configuration for `print(module)`."""
        c = self.config
        return (
            f"{c.method}, ratio={c.ratio}, buckets={c.num_buckets}, heads={self.table_heads}, "
            f"head_dim={self.head_dim}, skip={c.skip}"
        )


class ContextualRPE(_TableRPE):
    """A contextual encoding on queries or keys: `r[b,h,i,j] = x[b,h,i,:] · T[h,:,bucket(i,j)]`."""

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, axis: int = 0) -> None:
        super().__init__(config, head_dim, num_heads, axis)
        shape = (self.table_heads, head_dim, config.num_buckets)
        self.lookup_table_weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Encode queries, or keys; the result for keys must be transposed.

        Args:
            x: Queries or keys `(B, H, L, d)`.
            height: Rows of the grid.
            width: Columns of the grid. If both are None, the tokens must form a square.

        Returns:
            The summand of the attention logits, `(B, H, L, L)`.

        Raises:
            ValueError: The tokens do not form the grid.
        """
        ids = self._bucket_ids(x, height, width)
        lookup = self._apply_table(x, self.lookup_table_weight)
        return self._gather(lookup, ids)

    def table(self) -> Tensor:
        """Return the table `(Hs, d, K)` for `rpe_ops.attention`."""
        return self.lookup_table_weight


class BiasRPE(_TableRPE):
    """A bias encoding on queries or keys: `r[h,i,j] = T[h,bucket(i,j)]` for all inputs."""

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, axis: int = 0) -> None:
        super().__init__(config, head_dim, num_heads, axis)
        self.lookup_table_bias = nn.Parameter(torch.empty(self.table_heads, config.num_buckets))
        self.reset_parameters()

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Encode positions.

        Args:
            x: Queries or keys `(B, H, L, d)`. Only their length has an effect.
            height: Rows of the grid.
            width: Columns of the grid. If both are None, the tokens must form a square.

        Returns:
            The summand of the attention logits, `(1, Hs, L, L)`.

        Raises:
            ValueError: The tokens do not form the grid.
        """
        ids = self._bucket_ids(x, height, width)
        lookup = self.lookup_table_bias[None, :, None].expand(-1, -1, x.shape[-2], -1)
        return self._gather(lookup, ids)

    def table(self) -> Tensor:
        """Return the table `(Hs, K)` for `rpe_ops.attention`."""
        return self.lookup_table_bias


class ValueRPE(_TableRPE):
    """A contextual encoding on values: `o[b,h,i,:] = Σ_j a[b,h,i,j] · T[h,bucket(i,j),:]`."""

    def __init__(self, config: RPEConfig, head_dim: int, num_heads: int, axis: int = 0) -> None:
        super().__init__(config, head_dim, num_heads, axis)
        shape = (self.table_heads, config.num_buckets, head_dim)
        self.lookup_table_weight = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def forward(self, attn: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Encode attention weights.

        Args:
            attn: Attention weights `(B, H, L, L)` after softmax and dropout.
            height: Rows of the grid.
            width: Columns of the grid. If both are None, the tokens must form a square.

        Returns:
            The summand of the attention output, `(B, H, L, d)`.

        Raises:
            ValueError: The tokens do not form the grid.
        """
        ids = self._bucket_ids(attn, height, width)
        sums = self._bucket_sum(attn, ids)
        return self._apply_table(sums, self.lookup_table_weight)

    def _bucket_sum(self, attn: Tensor, ids: Tensor) -> Tensor:
        """Sum the attention weights of every bucket."""
        buckets = self.config.num_buckets
        if is_recording():
            return reference.bucket_sum(attn, ids, buckets)
        return rpe_ops.bucket_sum(
            attn, ids, buckets, implementation=self.implementation, check_bounds=False
        )

    def table(self) -> Tensor:
        """Return the table `(Hs, K, d)` for `rpe_ops.attention`."""
        return self.lookup_table_weight


class CrossRPE(nn.Module):
    """The encoding of the method `cross`: the sum of an encoding of rows and one of columns."""

    def __init__(
        self, encoding: type[_TableRPE], config: RPEConfig, head_dim: int, num_heads: int
    ) -> None:
        super().__init__()
        self.config = config
        self.implementation = "auto"
        self.rp_rows = encoding(config, head_dim, num_heads, axis=0)
        self.rp_cols = encoding(config, head_dim, num_heads, axis=1)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Encode `x`; arguments, shapes and errors are those of the class `encoding`."""
        return self.rp_rows(x, height, width) + self.rp_cols(x, height, width)

    def table(self) -> Tensor:
        """Return both tables, joined along the buckets, for `rpe_ops.attention`."""
        buckets = 1 if isinstance(self.rp_rows, ValueRPE) else -1
        return torch.cat((self.rp_rows.table(), self.rp_cols.table()), buckets)


def build_rpe(
    config: RPEConfig | None, head_dim: int, num_heads: int
) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
    """Build the encodings on queries, keys and values.

    `irpe_core.rpe_attention` calls `rpe_k` on the scaled queries and `rpe_v` on the attention
    weights. It calls `rpe_q` on the scaled keys and transposes the result.

    Args:
        config: The encoding; None for no encoding.
        head_dim: Channels of one head.
        num_heads: Number of heads.

    Returns:
        `(rpe_q, rpe_k, rpe_v)`. Encodings that are not in `config.rpe_on` are None.
    """
    if config is None:
        return None, None, None

    def build(letter: str) -> nn.Module | None:
        """Build the encoding of one letter; None if `rpe_on` does not have it."""
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
