"""The fixed absolute position embedding: sines and cosines of the row and the column of a token.

    row: sin(y · ω), cos(y · ω);  column: sin(x · ω), cos(x · ω);  ω = 10000^(-n / (C/4)), n < C/4

It is timm's `build_sincos2d_pos_embed`, as in MoCo v3 (Chen et al., ICCV 2021), and is computed for
the grid of the model, so it is not in the state dict. The tokens before the grid get zero.
"""

import math

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

__all__ = ["use_sine_embedding"]


def use_sine_embedding(model: nn.Module) -> None:
    """Replace the learned position embedding of a vision transformer of timm, in place.

    Raises:
        ValueError: The model has no learned embedding of this form, or its number of channels is
            not divisible by 4.
    """
    learned, grid = getattr(model, "pos_embed", None), _grid(model)
    if not isinstance(learned, Tensor) or learned.dim() != 3 or grid is None:
        raise ValueError(
            "abs_pos_embed must be true or false for a model without a learned position embedding "
            f"of its tokens, got 'sine' for {type(model).__name__}"
        )
    channels = learned.shape[-1]
    if channels % 4:
        raise ValueError(
            f"embed_dim must be divisible by 4 for abs_pos_embed 'sine', got {channels}"
        )
    prefix = torch.zeros(learned.shape[1] - math.prod(grid), channels)
    patches = build_sincos2d_pos_embed(list(grid), channels)
    del model.pos_embed
    model.register_buffer("pos_embed", torch.cat([prefix, patches])[None], persistent=False)


def _grid(model: nn.Module) -> tuple[int, int] | None:
    """Return the grid of a model; None if it does not have one."""
    return getattr(getattr(model, "patch_embed", None), "grid_size", None)
