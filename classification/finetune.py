"""Adapt the weights of a classifier to another image size or number of classes.

The position embedding is resampled bicubically to the new grid, as in DeiT (Touvron et al., ICML
2021, section 5); both grids may be rectangles. The tables of iRPE are copied without a change,
because a bucket stands for the same distance on every grid.
"""

import logging
import math

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from irpe_core import CheckpointError

__all__ = ["KERNEL", "adapt_positions", "adapt_weights", "recorded_image_size"]

logger = logging.getLogger(__name__)

KERNEL = "patch_embed.proj.weight"  # (C, input channels, height, width) of a patch
_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")


def recorded_image_size(checkpoint: dict, source: str) -> tuple[int, int] | None:
    """Return height and width of the training images of a checkpoint, or None if unknown.

    Raises:
        CheckpointError: `args.input_size` of the checkpoint is not a size.
    """
    size = (checkpoint.get("args") or {}).get("input_size")
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise CheckpointError(
            f"args of {source}: input_size must be one side or height and width in pixels, "
            f"got {size!r}"
        )
    return pair


def adapt_weights(
    weights: dict[str, Tensor], model: nn.Module, image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Adapt a state dict to a model of another image size or number of classes.

    A head with another number of classes is replaced by the random head of the model. Both changes
    are logged. Other differences are left as they are; `irpe_core.load_weights` reports them.

    Args:
        weights: The state dict.
        model: A vision transformer of timm, with iRPE or without.
        image_size: Height and width in pixels of the images that the weights were trained on. If
            None, a position embedding of the right shape is kept, and another one is assumed to be
            of square images.

    Returns:
        A new state dict.

    Raises:
        CheckpointError: The position embedding does not have the patches of such an image.
    """
    weights, own = dict(weights), model.state_dict()
    for key in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"):
        if key in own and key in weights and weights[key].shape != own[key].shape:
            logger.info("%s has new random weights for %d classes", key, len(own[key]))
            weights[key] = own[key]
    return adapt_positions(weights, model, image_size)


def adapt_positions(
    weights: dict[str, Tensor], model: nn.Module, image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Return a state dict with the position embedding resampled to the grid of the model.

    The other weights stay the same, and so does the embedding if both grids are equal. Arguments
    and errors are those of `adapt_weights`.
    """
    patch_embed = getattr(model, "patch_embed", None)
    own = model.state_dict()
    if hasattr(patch_embed, "dynamic_feat_size") and _differ_only_in_grid(weights, own):
        return {**weights, "pos_embed": _resample(weights["pos_embed"], model, image_size)}
    return weights


def _differ_only_in_grid(weights: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Return True if both have a position embedding `(1, P + h·w, C)` with the same P and C."""
    shapes, own_shapes = (
        {name: tuple(x.shape) for name, x in state.items()} for state in (weights, own)
    )
    found, wanted = shapes.get("pos_embed", ()), own_shapes.get("pos_embed", ())
    # The number of input channels has nothing to do with the grid.
    kernel, own_kernel = (each.get(KERNEL, ()) for each in (shapes, own_shapes))
    return (
        len(found) == len(wanted) == 3
        and found[::2] == wanted[::2]
        and (kernel[:1], kernel[2:]) == (own_kernel[:1], own_kernel[2:])
        and all(shapes.get(name) == own_shapes.get(name) for name in _PREFIX_TOKENS)
    )


def _resample(embedding: Tensor, model: nn.Module, image_size: tuple[int, int] | None) -> Tensor:
    """Resample a position embedding `(1, P + h·w, C)` to the grid of the model."""
    new_grid = tuple(model.patch_embed.grid_size)
    # P is the number of tokens before the patches that have a position: 1 for a class token, 2 with
    # a distillation token, 0 in models that give positions only to patches.
    prefix = model.pos_embed.shape[1] - math.prod(new_grid)
    patches = max(embedding.shape[1] - prefix, 0)
    if image_size is None:
        if embedding.shape == model.pos_embed.shape:
            return embedding
        old_grid = (math.isqrt(patches),) * 2
        rule = "a square number of patches, as it records no image size (args.input_size)"
    else:
        old_grid = tuple(model.patch_embed.dynamic_feat_size(image_size))
        rule = "{} x {} patches, as its image size is {} x {}".format(*old_grid, *image_size)
    if patches < 1 or math.prod(old_grid) != patches:
        raise CheckpointError(
            f"the checkpoint must have a position embedding of {rule}, got {patches}"
        )
    if old_grid == new_grid:
        return embedding
    if image_size is None:
        logger.info("the checkpoint records no image size: its images are assumed to be square")
    with torch.no_grad():
        resampled = resample_abs_pos_embed(embedding, new_grid, old_grid, num_prefix_tokens=prefix)
    logger.info("position embedding resampled to a grid of %d x %d", *new_grid)
    return resampled
