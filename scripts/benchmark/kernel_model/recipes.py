"""Attention layers of the recipes, and their forward and backward on any device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from irpe_core import parse_rpe_spec
from irpe_core.buckets import grid_buckets

__all__ = ["MODELED", "QUICK", "RECIPES", "Recipe", "attention_steps"]


class Recipe(NamedTuple):
    """Attention layer of a recipe.

    Attributes:
        name: Model, grid, encodings and dtype.
        spec: Specification of the encodings.
        height: Height of the grid in tokens.
        width: Width of the grid in tokens.
        skip: Number of tokens before the grid.
        batch: Batch size per process B.
        heads: Number of heads H.
        head_dim: Head dim d.
        dtype: Data type of all tensors.
        dropout_p: Probability of dropout on the attention weights.
        has_padding: The layer gets a mask of padded keys.
    """

    name: str
    spec: str
    height: int
    width: int
    skip: int
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    dropout_p: float
    has_padding: bool

    @property
    def tokens(self) -> int:
        """Number of tokens L."""
        return self.skip + self.height * self.width

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key in the layer, B·H·L²."""
        return self.batch * self.heads * self.tokens**2


def _deit(name: str, letters: str) -> Recipe:
    """Return a layer of DeiT at 224 × 224."""
    spec = f"rpe-1.9-product-ctx-1-{letters}"
    return Recipe(f"{name} {letters}", spec, 14, 14, 1, 128, 6, 64, torch.bfloat16, 0.0, False)


def _detr(height: int, width: int, letters: str, dtype: torch.dtype) -> Recipe:
    """Return an encoder layer of DETR."""
    name = f"DETR {height}x{width} {letters} {str(dtype).removeprefix('torch.')}"
    spec = f"rpe-2.0-product-ctx-1-{letters}"
    return Recipe(name, spec, height, width, 0, 2, 8, 32, dtype, 0.1, True)


RECIPES = [
    _deit("DeiT-S/B", "k"),
    _deit("DeiT-S/B", "qkv"),
    *(
        _detr(height, width, letters, dtype)
        for height, width in ((25, 42), (50, 84))
        for letters in ("k", "qkv")
        for dtype in (torch.bfloat16, torch.float16)
    ),
    _detr(25, 42, "k", torch.float32),
    # Other head dims, for each family of kernels.
    *(
        recipe._replace(name=f"{recipe.name}, head dim {head_dim}", head_dim=head_dim)
        for recipe in (_deit("DeiT", "qkv"), _detr(50, 84, "qkv", torch.bfloat16))
        for head_dim in (16, 128)
    ),
]
# One recipe for each family of kernels: flat tiles, and tiles of grid rows.
QUICK = [_detr(25, 42, "qkv", torch.bfloat16), _detr(50, 84, "qkv", torch.bfloat16)]
# Layers of published configurations; DETR's encode the keys only.
MODELED = [
    _deit("DeiT-S/B", "k"),
    _deit("DeiT-S/B", "qkv"),
    _detr(25, 42, "k", torch.bfloat16),
    _detr(50, 84, "k", torch.bfloat16),
]


def attention_steps(recipe: Recipe, device: str) -> dict[str, Callable[[], None]]:
    """Return the Triton attention of a layer as two steps, to be called in this order.

    On `meta`, the kernels must be replaced. On `cpu`, they must run in the interpreter. All values
    are zero, and no key is padded.
    """
    from rpe_ops import triton_kernels

    config = parse_rpe_spec(recipe.spec, skip=recipe.skip)
    buckets = grid_buckets(config, recipe.height, recipe.width, device)

    def tensor(*shape: int, dtype: torch.dtype = recipe.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    batch, heads, tokens, dim = recipe.batch, recipe.heads, buckets.num_tokens, recipe.head_dim
    qkv = tensor(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind()
    table_k, table_q, table_v = (
        tensor(1, dim, buckets.num_lookups) if letter in config.rpe_on else None for letter in "kqv"
    )
    if table_v is not None:
        table_v = tensor(1, buckets.num_lookups, dim)
    padding = tensor(batch, tokens, dtype=torch.bool) if recipe.has_padding else None
    seed = tensor(1, dtype=torch.int64)
    inputs = (*qkv, table_k, table_q, table_v, buckets, padding, seed)
    numbers = (dim**-0.5, recipe.dropout_p)
    # The gradient of the output has the memory order of the output, (B, L, H, d).
    grad_out = tensor(batch, tokens, heads, dim).transpose(1, 2)
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = triton_kernels.attention_forward(*inputs, *numbers)

    def backward() -> None:
        triton_kernels.attention_backward(grad_out, *inputs, *outputs, *numbers)

    return {"forward": forward, "backward": backward}
