"""Mixed precision and the optimizer's step: what every trainer does alike.

Float16 needs its gradients scaled up to survive the backward pass; bfloat16 and float32 do not, and
a scaler that is switched off passes everything through, so one code path serves all three.
"""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision of a forward pass; float32 is none."""
    mixed = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if mixed else None, enabled=mixed)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """The gradient scaler for a precision: at work for float16 alone."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def optimizer_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None
) -> torch.Tensor | None:
    """Clips the gradients, steps and clears them. The scaler skips a step that overflowed.

    Args:
        optimizer: steps with the gradients its parameters hold.
        scaler: the one whose `scale(loss)` was differentiated.
        clip_grad: largest norm of all gradients together; None leaves them alone.

    Returns:
        The norm before clipping, on the device; None without clipping.
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
