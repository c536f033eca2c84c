"""Weights of one model adapted to another image size or number of classes.

The position embedding is resampled bicubically to the new grid, as in DeiT (Touvron et al., ICML
2021, section 5); a rectangle may become any other. The iRPE tables are carried over as they are:
a bucket means the same distance on every grid.
"""

import logging

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

__all__ = ["adapt_weights"]

logger = logging.getLogger(__name__)


def adapt_weights(
    weights: dict[str, Tensor], model: nn.Module, image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Make a state dict fit a model of another size or number of classes.

    Heads of another width keep the model's fresh values; what was done is logged. Everything else
    is left to `irpe_core.load_weights`.

    Args:
        weights: The state dict to start from.
        model: A vision transformer of timm, with iRPE or without.
        image_size: `(height, width)` in pixels that the weights were trained at; None for a square.

    Returns:
        A new state dict.
    """
    weights, own = dict(weights), model.state_dict()
    for key in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"):
        if key in own and key in weights and weights[key].shape != own[key].shape:
            logger.info("%s starts anew: %d classes now", key, len(own[key]))
            weights[key] = own[key]
    if "pos_embed" in own and "pos_embed" in weights:
        weights["pos_embed"] = _resample(weights, model, image_size)
    return weights


def _resample(
    weights: dict[str, Tensor], model: nn.Module, image_size: tuple[int, int] | None
) -> Tensor:
    """The position embedding `(1, P + h·w, C)` on the model's grid."""
    embedding, prefix = weights["pos_embed"], 1 + ("dist_token" in weights)
    new_grid = tuple(model.patch_embed.grid_size)
    old_grid = None
    if image_size is not None:
        patch = weights["patch_embed.proj.weight"].shape[-2:]
        old_grid = tuple(side // p for side, p in zip(image_size, patch, strict=True))
        if old_grid == new_grid:
            return embedding
    with torch.no_grad():
        resampled = resample_abs_pos_embed(embedding, new_grid, old_grid, num_prefix_tokens=prefix)
    if resampled is not embedding:
        logger.info("position embedding resampled to a grid of %d x %d", *new_grid)
    return resampled
