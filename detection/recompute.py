"""Gradient checkpointing: recompute layers in the backward pass, to store fewer activations.

Only the inputs of the layer are stored. Random numbers, such as those of dropout, are the same in
both passes, so the gradients are the same.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["run_layer"]


def run_layer(layer: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Return `layer(*inputs)`, which is computed again in the backward pass with `recompute`."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)
