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
    lookups = _lookup(q, table_k, scale), _lookup(k, table_q, scale)
    rest = (buckets, key_padding, seed, table_v is not None, scale, dropout_p)
    out, sums, lse = lookup_forward(q, k, v, *lookups, *rest)
    if table_v is not None:
        out += _product(sums, table_v)
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
    lookups = _lookup(q, table_k, scale), _lookup(k, table_q, scale)
    # `out` includes sums T_v, so this is the delta of both outputs of the attention with lookups:
    # the gradient of `sums` times `sums` equals `grad_out` times sums T_v.
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    grad_sums = grad_table_v = None
    if table_v is not None:
        grad_sums = _product(grad_out, table_v.transpose(-2, -1))
        grad_table_v = _sum_of_products(sums, grad_out, table_v)
    rest = (buckets, key_padding, seed, delta, lse, scale, dropout_p)
    grad_q, grad_k, grad_v, *grad_lookups = lookup_backward(
        grad_out, grad_sums, q, k, v, *lookups, *rest
    )
    grad_table_k = _through_table(grad_lookups[0], q, table_k, scale, grad_q)
    grad_table_q = _through_table(grad_lookups[1], k, table_q, scale, grad_k)
    return grad_q, grad_k, grad_v, grad_table_k, grad_table_q, grad_table_v


def _lookup(x: Tensor, table: Tensor | None, scale: float) -> Tensor | None:
    """Return the lookup `(B, H, L, terms·K)` of tokens `x (B, H, L, d)`."""
    if table is None:
        return None
    if table.ndim == 2:
        return table[None, :, None].expand(*x.shape[:-1], -1)
    return _product(x, table, scale)


def _through_table(
    grad_lookup: Tensor | None, x: Tensor, table: Tensor | None, scale: float, grad_x: Tensor
) -> Tensor | None:
    """Return the gradient of a table, and add the gradient of the tokens `x` to `grad_x`."""
    if table is None:
        return None
    if table.ndim == 2:
        grad = grad_lookup.sum((0, 2), dtype=torch.promote_types(x.dtype, torch.float32))
        return (grad.sum(0, keepdim=True) if len(table) == 1 else grad).to(x.dtype)
    grad_x += _product(grad_lookup, table.transpose(-2, -1), scale)
    return _sum_of_products(x, grad_lookup, table, scale)


def _product(x: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Return `scale·x (B, H, L, m) @ table (Hs, m, n)`, scaled before it is rounded."""
    rows = _rows_of_tables(x, table)
    product = torch.baddbmm(x.new_zeros(()), rows, table, beta=0, alpha=scale)
    if len(table) == 1:
        return product.view(*x.shape[:-1], -1)
    return product.unflatten(1, (len(x), -1)).transpose(0, 1)


def _sum_of_products(x: Tensor, y: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """Return `scale·xᵀ y` of `(B, H, L, m)` and `(B, H, L, n)`, summed over what shares a table."""
    x, y = _rows_of_tables(x, table), _rows_of_tables(y, table)
    return torch.baddbmm(x.new_zeros(()), x.transpose(1, 2), y, beta=0, alpha=scale)


def _rows_of_tables(x: Tensor, table: Tensor) -> Tensor:
    """Reshape `(B, H, L, n)` to `(Hs, rows, n)`, with all tokens that share a table as rows."""
    return x.flatten(0, 2)[None] if len(table) == 1 else x.transpose(0, 1).flatten(1, 2)
