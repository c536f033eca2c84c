"""Lines for the start of the log: what is trained, and how."""

import torch
from torch import nn

__all__ = ["describe_training"]


def describe_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> dict[str, str]:
    """Return lines about model and optimizer: title → text.

    Args:
        model: The model.
        optimizer: The optimizer. Its learning rates are those after the warm-up.
        dtype: Data type of mixed precision.
    """
    groups = optimizer.param_groups
    lrs = {group.get("initial_lr", group["lr"]) * group.get("lr_scale", 1.0) for group in groups}
    lrs = sorted(lrs, reverse=True)
    # Layer-wise decay has one learning rate for each layer.
    shown = [f"{lr:.6g}" for lr in lrs] if len(lrs) < 4 else [f"{lrs[0]:.6g} to {lrs[-1]:.6g}"]
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return {
        "parameters": f"{trainable:,} trainable of {sum(p.numel() for p in parameters):,}",
        "learning rate": f"{', '.join(shown)} ({type(optimizer).__name__})",
        "dtype": str(dtype).removeprefix("torch."),
    }
