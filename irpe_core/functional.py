"""Scaled dot-product attention with relative position encoding.

    logits = q kᵀ·scale + rpe_k(q·scale) + rpe_q(k·scale)ᵀ + mask
    out    = a v + rpe_v(a),    a = dropout(softmax(logits))

Source: iRPE (Wu et al., ICCV 2021). Without encodings this is
`torch.nn.functional.scaled_dot_product_attention`. The conventions are the same: a boolean mask is
True where attention is allowed, and the output of a query that may attend nowhere is zero.

There are two ways to compute it. If an implementation of `rpe_ops.attention` runs on the device,
attention is one fused operator (`irpe_core.fused`). Otherwise, and also with a mask of single pairs
or with encodings of different methods or ratios, attention is composed of torch's operators
(`irpe_core.composed`). On a GPU, the implementation "auto" measures which way is faster
(`irpe_core.autotune`).
"""

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rpe_ops
from irpe_core import candidates
from irpe_core.autotune import AUTOTUNER, is_enabled
from irpe_core.candidates import COMPOSED
from irpe_core.composed import composed_attention
from irpe_core.fused import can_fuse, first_encoding, fused_attention, fused_implementation

__all__ = ["rpe_attention", "set_implementation"]

logger = logging.getLogger(__name__)


def set_implementation(
    module: nn.Module,
    implementation: str,
    device: torch.device | str,
    *,
    choices: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Choose the implementation of all encodings in `module`.

    Args:
        module: A module that contains encodings from `build_rpe`.
        implementation: `"auto"` or a name in `rpe_ops.IMPLEMENTATIONS`.
        device: Device on which the module will run.
        choices: `AUTOTUNER.state_dict()` of an earlier training, for the same choices of "auto".

    Returns:
        A description of the operators that will run, with the reason if attention is not fused.
        It is also logged.

    Raises:
        ValueError: The name is unknown.
        rpe_ops.ImplementationError: The named implementation cannot run on the device.
        CheckpointError: `choices` is not a state of the autotuner.
    """
    device = torch.device(device)
    AUTOTUNER.load_state_dict(choices or {})
    gather = rpe_ops.resolve(implementation, device)
    encodings = [m for m in module.modules() if hasattr(m, "implementation")]
    for encoding in encodings:
        encoding.implementation = implementation
    operators = _describe(implementation, device, gather) if encodings else "none in this model"
    logger.info("position encodings: %s", operators)
    return operators


def _describe(implementation: str, device: torch.device, gather: str) -> str:
    """Describe the operators that will run for a choice of the implementation."""
    fused = fused_implementation(implementation, device)
    if implementation == "auto" and fused == "triton" and is_enabled():
        listed = ", ".join(candidates.CANDIDATES)
        return f"the fastest attention of {listed}, measured at the first call"
    if fused is not None:
        return f"fused attention by {fused}"
    reasons = rpe_ops.available_implementations(device, "attention")
    against = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    chosen = f"chosen: {implementation}" if implementation != "auto" else against
    return f"gather by {gather}, attention not fused ({chosen})"


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: nn.Module | None = None,
    rpe_k: nn.Module | None = None,
    rpe_v: nn.Module | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend with relative position encodings on any of queries, keys and values.

    Args:
        q: Queries `(B, H, L, d)`, not yet scaled.
        k: Keys `(B, H, L, d)`.
        v: Values `(B, H, L, d)`.
        rpe_q: Encoding from `build_rpe`, computed from the keys.
        rpe_k: Encoding from `build_rpe`, computed from the queries.
        rpe_v: Encoding from `build_rpe`, computed from the attention weights.
        height: Rows of the grid.
        width: Columns of the grid. If both are None, the tokens must form a square.
        attn_mask: Mask that can be broadcast to `(B, H, L, L)`: boolean, True where attention is
            allowed, or floating point, added to the logits with the encodings.
        dropout_p: Probability of dropping an attention weight; 0 for evaluation.
        scale: Factor on the queries (on the keys for `rpe_q`); default `d**-0.5`.

    Returns:
        The output `(B, H, L, d)`.

    Raises:
        ValueError: The tokens do not form the grid, queries and keys differ in number, the scale is
            0, or the mask is neither boolean nor floating point.
    """
    if rpe_q is None and rpe_k is None and rpe_v is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=scale)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(
            "queries and keys must be the same tokens for relative positions, "
            f"got {q.shape[-2]} queries and {k.shape[-2]} keys"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale == 0:
        raise ValueError(f"scale must not be 0, got {scale!r}")
    encodings = rpe_q, rpe_k, rpe_v
    choice = first_encoding(encodings).implementation
    arguments = (q, k, v, encodings, (height, width), attn_mask, dropout_p, scale)
    fused = fused_implementation(choice, q.device)
    if fused is not None and can_fuse(fused, q, encodings, attn_mask):
        if choice == "auto" and fused == "triton":
            fused = AUTOTUNER.choose(
                q, encodings, (height, width), attn_mask is not None, dropout_p
            )
        if fused != COMPOSED:
            return fused_attention(*arguments, fused)
    return composed_attention(*arguments)
