"""Detectors for the tests: without downloads, and small."""

import torch
from torch import Tensor, nn

from detection.build import build_network
from detection.config import DetectionConfig, parse_args
from tests.recipes import fill, input_b

__all__ = ["SMALL", "config", "network", "images_of"]

SMALL = (
    "--backbone small --backbone_norm batch --hidden_dim 32 --nheads 4 --dim_feedforward 48 "
    "--enc_layers 2 --dec_layers 3 --num_queries 7 --num_classes 5"
)


def config(flags: str = SMALL, **changes: object) -> DetectionConfig:
    """Return the configuration of some flags, with random weights of the backbone."""
    parsed = parse_args(["--backbone_weights", "none", *flags.split()])
    return parsed.model_copy(update=changes)


def network(flags: str = SMALL) -> nn.Module:
    """Return a network in evaluation mode with weights of recipe B, which are all different."""
    return fill(build_network(config(flags)).eval())


def images_of(*shapes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return images of recipe B, padded to the largest, and their mask."""
    height, width = (max(side) for side in zip(*shapes, strict=True))
    images = torch.zeros(len(shapes), 3, height, width)
    mask = torch.ones(len(shapes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(shapes):
        images[i, :, :h, :w] = input_b(3, h, w, seed=1234 + i).float()
        mask[i, :h, :w] = False
    return images, mask
