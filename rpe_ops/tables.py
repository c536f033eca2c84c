"""Attention with tables, composed of an attention with lookups and of matrix products.

    lookup_k = scale·q T_k,   lookup_q = scale·k T_q,   out += sums T_v

and the gradients of all of them. A bias needs no product: it is a lookup with the same row for
every token. The backward recomputes the lookups, because they need K/d times the memory of the
queries.

The attention with lookups is an argument: `lookup_forward` and `lookup_backward` of
`rpe_ops.reference` or of the Triton kernels. Notation: rpe_ops/README.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rpe_ops.grid import GridBuckets

__all__ = ["attention_forward", "attention_backward"]


def attention_forward(
    lookup_forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_k: Tensor | None,
    table_q: Tensor | None,
    table_v: Tensor | None,
    buckets: GridBuckets,
    key_padding: Tensor | None,
    seed: Tensor,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend; see `rpe_ops.attention`.

    Returns:
        `out (B, H, L, d)`, in the memory order `(B, L, H, d)`; `sums (B, H, L, terms·K)`, the
        bucket sums of the attention weights, or an empty tensor without `table_v`; and
        `lse (B, H, L)`, the logarithm of the sum of exponentials of every row of logits, float32
        or wider, -inf for a query without any key.
    """
    lookup_k, _ = _lookup(q, table_k, scale)
    lookup_q, _ = _lookup(k, table_q, scale)
    rest = (buckets, key_padding, seed, table_v is not None, scale, dropout_p)
    out, sums, lse = lookup_forward(q, k, v, lookup_k, lookup_q, *rest)
    if table_v is not None:
        out += _product(_rows(sums, table_v), table_v, q.shape)
    return out, sums, lse


def attention_backward(
    lookup_backward: Callable[..., tuple[Tensor | None, ...]],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table_k: Tensor | None,
    table_q: Tensor | None,
    table_v: Tensor | None,
    buckets: GridBuckets,
    key_padding: Tensor | None,
    seed: Tensor,
    out: Tensor,
    sums: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of q, k, v, table_k, table_q and table_v; None for an absent input."""
    lookup_k, rows_q = _lookup(q, table_k, scale)
    lookup_q, rows_k = _lookup(k, table_q, scale)
    # `out` includes sums T_v, so this is the delta of both outputs of the attention with lookups:
    # the gradient of `sums` times `sums` equals `grad_out` times sums T_v.
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    grad_sums = grad_table_v = None
    if table_v is not None:
        rows = _rows(grad_out, table_v)
        grad_sums = _product(rows, table_v.transpose(1, 2), q.shape)
        grad_table_v = _sum_of_products(_rows(sums, table_v), rows)
    rest = (buckets, key_padding, seed, delta, lse, scale, dropout_p)
    grad_q, grad_k, grad_v, grad_lookup_k, grad_lookup_q = lookup_backward(
        grad_out, grad_sums, q, k, v, lookup_k, lookup_q, *rest
    )
    grad_table_k = _through_table(grad_lookup_k, rows_q, table_k, scale, grad_q)
    grad_table_q = _through_table(grad_lookup_q, rows_k, table_q, scale, grad_k)
    return grad_q, grad_k, grad_v, grad_table_k, grad_table_q, grad_table_v


def _lookup(x: Tensor, table: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor | None]:
    """Return the lookup `(B, H, L, terms·K)` of tokens `x (B, H, L, d)`, and `_rows` of `x`.

    A bias has a lookup without rows. An absent table has neither.
    """
    if table is None:
        return None, None
    if table.ndim == 2:
        return table[None, :, None].expand(*x.shape[:-1], -1), None
    rows = _rows(x, table)
    return _product(rows, table, x.shape, scale), rows


def _through_table(
    grad_lookup: Tensor | None,
    rows: Tensor | None,
    table: Tensor | None,
    scale: float,
    grad_x: Tensor,
) -> Tensor | None:
    """Return the gradient of a table, and add the gradient of the tokens to `grad_x`.

    `rows` are those of the tokens, from `_lookup`.
    """
    if table is None:
        return None
    if table.ndim == 2:
        grad = grad_lookup.sum((0, 2), dtype=torch.promote_types(grad_x.dtype, torch.float32))
        return (grad.sum(0, keepdim=True) if len(table) == 1 else grad).to(grad_x.dtype)
    rows_of_grad = _rows(grad_lookup, table)
    grad_x += _product(rows_of_grad, table.transpose(1, 2), grad_x.shape, scale)
    return _sum_of_products(rows, rows_of_grad, scale)


def _rows(x: Tensor, table: Tensor) -> Tensor:
    """Reshape `(B, H, L, n)` to `(Hs, rows, n)`, with all tokens that share a table as rows."""
    batch, heads, tokens, width = x.shape
    if table.shape[0] == 1:
        return x.reshape(1, batch * heads * tokens, width)
    return x.transpose(0, 1).reshape(heads, batch * tokens, width)


def _product(rows: Tensor, table: Tensor, shape: torch.Size, scale: float = 1.0) -> Tensor:
    """Return `scale·x (B, H, L, m) @ table (Hs, m, n)`, scaled before it is rounded.

    `rows` are those of `x`, and `shape` begins with B, H, L.
    """
    product = _scaled_product(rows, table, scale)
    batch, heads, tokens, _ = shape
    if table.shape[0] == 1:
        return product.view(batch, heads, tokens, table.shape[2])
    return product.view(heads, batch, tokens, table.shape[2]).transpose(0, 1)


def _sum_of_products(rows_x: Tensor, rows_y: Tensor, scale: float = 1.0) -> Tensor:
    """Return `scale·xᵀ y` of `(B, H, L, m)` and `(B, H, L, n)`, summed over what shares a table."""
    return _scaled_product(rows_x.transpose(1, 2), rows_y, scale)


def _scaled_product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """Return `scale·x @ y` of batches of matrices, scaled before it is rounded."""
    # With beta = 0, the first argument is not read.
    return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=scale)
