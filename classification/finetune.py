"""Weights of one model adapted to another image size or number of classes.

The position embedding is resampled bicubically to the new grid, as in DeiT (Touvron et al., ICML
2021, section 5); a rectangle may become any other. The iRPE tables are carried over as they are:
a bucket means the same distance on every grid.
"""

import logging
import math

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from irpe_core import CheckpointError

__all__ = ["adapt_weights"]

logger = logging.getLogger(__name__)

# Where these are alike the position embeddings differ in their grids alone.
_BESIDE_THE_GRID = ("patch_embed.proj.weight", "cls_token", "dist_token", "reg_token")


def adapt_weights(
    weights: dict[str, Tensor], model: nn.Module, image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Make a state dict fit a model of another size or number of classes.

    Heads of another width keep the model's fresh values; what was done is logged. Everything else
    is left to `irpe_core.load_weights`.

    Args:
        weights: The state dict to start from.
        model: A vision transformer of timm, with iRPE or without.
        image_size: `(height, width)` in pixels that the weights were trained at. None if that is
            not known: position embeddings that fit are then left, others taken for a square.

    Returns:
        A new state dict.

    Raises:
        CheckpointError: The position embeddings are not those of such an image.
    """
    weights, own = dict(weights), model.state_dict()
    for key in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"):
        if key in own and key in weights and weights[key].shape != own[key].shape:
            logger.info("%s starts anew: %d classes now", key, len(own[key]))
            weights[key] = own[key]
    patches = getattr(model, "patch_embed", None)
    if hasattr(patches, "dynamic_feat_size") and _differ_in_grid_alone(weights, own):
        weights["pos_embed"] = _resample(weights["pos_embed"], model, image_size)
    return weights


def _differ_in_grid_alone(weights: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Whether both have position embeddings `(1, P + h·w, C)` of the same C and P.

    What does not is another model, and `load_weights` says which.
    """
    shapes, own_shapes = (
        {name: tuple(x.shape) for name, x in state.items()} for state in (weights, own)
    )
    found, wanted = shapes.get("pos_embed", ()), own_shapes.get("pos_embed", ())
    return (
        len(found) == len(wanted) == 3
        and found[::2] == wanted[::2]
        and all(shapes.get(name) == own_shapes.get(name) for name in _BESIDE_THE_GRID)
    )


def _resample(embedding: Tensor, model: nn.Module, image_size: tuple[int, int] | None) -> Tensor:
    """The position embedding `(1, P + h·w, C)` on the model's grid."""
    new_grid = tuple(model.patch_embed.grid_size)
    # P is 2 with a distillation token, and 0 in models that embed the patches' places alone.
    prefix = model.pos_embed.shape[1] - math.prod(new_grid)
    places = max(embedding.shape[1] - prefix, 0)
    if image_size is None:
        if embedding.shape == model.pos_embed.shape:
            return embedding
        old_grid = (math.isqrt(places),) * 2
        origin = "no square, and the checkpoint does not tell its image size (args.input_size)"
    else:
        old_grid = tuple(model.patch_embed.dynamic_feat_size(image_size))
        origin = "not the {} x {} of its image size, {} x {}".format(*old_grid, *image_size)
    if places < 1 or math.prod(old_grid) != places:
        raise CheckpointError(
            f"the checkpoint's position embedding is of {places} patches, which are {origin}"
        )
    if old_grid == new_grid:
        return embedding
    if image_size is None:
        logger.info("the checkpoint does not tell its image size: it is taken for a square")
    with torch.no_grad():
        resampled = resample_abs_pos_embed(embedding, new_grid, old_grid, num_prefix_tokens=prefix)
    logger.info("position embedding resampled to a grid of %d x %d", *new_grid)
    return resampled
