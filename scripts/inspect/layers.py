"""The attentions with iRPE in a model: their tables by position, and their attention weights.

Attention without iRPE has the same queries and keys, so it shows the effect of a single layer:

    with iRPE  softmax(z + r),    without  softmax(z),    z = q kᵀ / √d,    r = added to the logits
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from irpe_core import RPEAttention, RPEConfig, RPEMultiheadAttention
from irpe_core.buckets import grid_buckets
from irpe_core.encoding import resolve_grid

__all__ = [
    "LayerAttention",
    "encodings_of",
    "record_attention",
    "relative_buckets",
    "rpe_layers",
    "table_by_position",
    "used_buckets",
]


class LayerAttention(NamedTuple):
    """Attention of one layer for one image, averaged over its heads.

    Attributes:
        grid: Height and width in tokens.
        with_rpe: Attention weights with iRPE, `(L, L)`.
        without: Attention weights of the same queries and keys without iRPE, `(L, L)`.
        added: Encodings that iRPE adds to the logits, `(L, L)`; None without iRPE on q and k.
    """

    grid: tuple[int, int]
    with_rpe: Tensor
    without: Tensor
    added: Tensor | None


def rpe_layers(model: nn.Module) -> list[nn.Module]:
    """Return the attentions with iRPE of a model, in the order of its layers."""
    kinds = RPEAttention, RPEMultiheadAttention
    return [m for m in model.modules() if isinstance(m, kinds) and encodings_of(m)]


def encodings_of(attention: nn.Module) -> dict[str, nn.Module]:
    """Return the encodings of an attention by their letter."""
    found = {letter: getattr(attention, f"rpe_{letter}") for letter in "qkv"}
    return {letter: encoding for letter, encoding in found.items() if encoding is not None}


def relative_buckets(config: RPEConfig, height: int, width: int) -> Tensor:
    """Return the bucket of every position of a key relative to its query.

    Args:
        config: The encoding.
        height: Rows of the grid.
        width: Columns of the grid.

    Returns:
        `(terms, 2·height - 1, 2·width - 1)` int64; the query is in the center. The buckets of term
        `t` start at `t·K`, as in the result of `table()` of an encoding.
    """
    buckets = grid_buckets(config, height, width)
    # Axis offsets count from the key to the query.
    ids = (buckets.row_base[:, :, None] + buckets.local).flip(1, 2).long()
    return ids + torch.arange(len(ids))[:, None, None] * config.num_buckets


def table_by_position(letter: str, encoding: nn.Module, ids: Tensor) -> Tensor:
    """Return the content of a table at every position.

    Args:
        letter: `q`, `k` or `v`.
        encoding: The encoding of this letter.
        ids: Buckets `(terms, rows, columns)`.

    Returns:
        `(Hs, rows, columns)`: the numbers of a bias, or the lengths of the vectors of a contextual
        encoding. The two terms of the cross method are added first.
    """
    values = _table(letter, encoding)[..., ids].sum(-3)
    return values if encoding.config.mode == "bias" else values.norm(dim=1)


def used_buckets(letter: str, encoding: nn.Module) -> int:
    """Return the number of buckets that have a weight other than zero."""
    return int((_table(letter, encoding) != 0).flatten(0, -2).any(0).sum())


def _table(letter: str, encoding: nn.Module) -> Tensor:
    """Return a table with its buckets in the last dimension."""
    table = encoding.table().detach().float().cpu()
    return table.transpose(1, 2) if letter == "v" else table


@torch.no_grad()
def record_attention(model: nn.Module, images: Tensor) -> list[LayerAttention]:
    """Run a model and return the attention of its layers with iRPE.

    Args:
        model: The model, in evaluation mode and in float32.
        images: One normalized image `(1, 3, height, width)`.

    Returns:
        The attention of every layer.
    """
    layers = rpe_layers(model)
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def keep(layer: nn.Module, args: tuple, kwargs: dict[str, Any], _: Any) -> None:
        """Keep the arguments of a layer."""
        calls[layer] = args, kwargs

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        _attend_timm(layer, calls[layer][0])
        if isinstance(layer, RPEAttention)
        else _attend_torch(layer, *calls[layer])
        for layer in layers
    ]


def _attend_timm(attention: RPEAttention, args: tuple) -> LayerAttention:
    """Compute the attention of a layer of a vision transformer."""
    q, k = _outputs_of([attention.q_norm, attention.k_norm], lambda: attention(*args))
    encodings = encodings_of(attention)
    skip = next(iter(encodings.values())).config.skip
    grid = resolve_grid(q.shape[-2], skip, *(attention.grid or (None, None)))
    logits = attention.scale * q @ k.transpose(-2, -1)
    parts = []
    if "k" in encodings:
        parts.append(encodings["k"](q * attention.scale, *grid))
    if "q" in encodings:
        parts.append(encodings["q"](k * attention.scale, *grid).transpose(-2, -1))
    with_rpe = (logits + sum(parts)).softmax(-1)
    return _averaged(grid, with_rpe, logits.softmax(-1), parts)


def _attend_torch(
    attention: RPEMultiheadAttention, args: tuple, kwargs: dict[str, Any]
) -> LayerAttention:
    """Compute the attention of a layer of DETR's encoder."""
    kwargs = kwargs | {"need_weights": True, "average_attn_weights": False}
    encodings = {letter: e for letter, e in encodings_of(attention).items() if letter != "v"}
    weights: list[Tensor] = []
    parts = _outputs_of(
        list(encodings.values()), lambda: weights.append(attention(*args, **kwargs)[1])
    )
    parts = [
        part.transpose(-2, -1) if letter == "q" else part
        for letter, part in zip(encodings, parts, strict=True)
    ]
    plain = nn.MultiheadAttention(
        attention.embed_dim,
        attention.num_heads,
        bias=attention.in_proj_bias is not None,
        batch_first=attention.batch_first,
    )
    # The tables are left out.
    plain.load_state_dict(attention.state_dict(), strict=False)
    grid = kwargs.pop("hw", None) or attention.grid
    return _averaged(grid, weights[0], plain.eval()(*args, **kwargs)[1], parts)


def _outputs_of(modules: list[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """Call `run` and return the outputs of some modules."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: tuple, output: Tensor) -> None:
        """Keep the output of a module."""
        outputs[module] = output

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[module] for module in modules]


def _averaged(
    grid: tuple[int, int], with_rpe: Tensor, without: Tensor, parts: list[Tensor]
) -> LayerAttention:
    """Average the heads of one image, and sum the encodings on q and k."""
    added = sum(part[0].mean(0) for part in parts) if parts else None
    return LayerAttention(tuple(grid), with_rpe[0].mean(0), without[0].mean(0), added)
