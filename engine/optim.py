"""Mixed precision and the optimizer step.

Gradients in float16 must be scaled up, or small ones become zero. bfloat16 and float32 need no
scaling. A disabled scaler changes nothing, so the same code serves all three types.
"""

import torch

__all__ = ["DTYPES", "autocast", "make_scaler", "optimizer_step", "resolve_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, *, auto: torch.dtype) -> torch.dtype:
    """Return the dtype that an option `dtype` names; `auto` is the trainer's choice."""
    return auto if name == "auto" else DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of mixed precision for a forward pass; float32 disables it."""
    mixed = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if mixed else None, enabled=mixed)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Create a gradient scaler, which is enabled only for float16."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def optimizer_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None
) -> torch.Tensor | None:
    """Clip the gradients, step the optimizer and clear the gradients.

    The scaler skips a step whose gradients overflowed.

    Args:
        optimizer: Optimizer whose parameters have their gradients.
        scaler: Scaler of the loss that was differentiated.
        clip_grad: Maximum norm of all gradients together; None does not clip.

    Returns:
        The norm before clipping, as a scalar tensor on the device; None without clipping.
    """
    norm = None
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
