"""Which attention iRPE can take the place of, and why not another.

A replacement must compute, while its tables are zero, exactly what was there. That is known of
the classes below and of no other, whatever their layers are called: a subclass, a gate or a hook
may change the result without a trace in the parameters.
"""

import inspect

from torch import nn

__all__ = [
    "TIMM_ATTENTIONS",
    "TORCH_ATTENTIONS",
    "class_path",
    "check_replaceable",
    "reason_against",
]

TIMM_ATTENTIONS = {
    "timm.layers.attention.Attention",
    "timm.models.vision_transformer.Attention",  # where older releases have it
    "timm.models.eva.EvaAttention",
    "irpe_core.modules.RPEAttention",
}
TORCH_ATTENTIONS = {
    "torch.nn.modules.activation.MultiheadAttention",
    "irpe_core.multihead.RPEMultiheadAttention",
}

# Of timm's two classes together, in parameters, buffers and modules, and in arguments.
_TIMM_STATE = {
    *("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias"),
    *("q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"),
}
_TIMM_ARGUMENTS = {"x", "rope", "attn_mask", "is_causal"}


def class_path(module: nn.Module) -> str:
    """Where the class of a module is defined, `package.module.Class`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_replaceable(attention: nn.Module, classes: set[str]) -> None:
    """Raise ValueError, with the reason, unless iRPE can take the place of `attention`."""
    reason = reason_against(attention, classes)
    if reason:
        raise ValueError(f"{class_path(attention)} {reason}")


def reason_against(
    attention: nn.Module, classes: set[str] = TIMM_ATTENTIONS | TORCH_ATTENTIONS
) -> str:
    """Why iRPE cannot take the place of an attention; empty where it can.

    Args:
        attention: The module.
        classes: Paths of the classes that are taken.
    """
    own = [getattr(attention, name, None) for name in ("rpe_q", "rpe_k", "rpe_v")]
    if any(table is not None for table in own):
        return "already has iRPE"
    if class_path(attention) not in classes:
        return _reason_against_class(attention, classes)
    if any(hooks for name, hooks in vars(attention).items() if name.endswith("_hooks")):
        return "has hooks, which would be lost: register them after add_irpe"
    if "forward" in vars(attention):
        return "has a forward of its own in place of its class's"
    is_timms = class_path(attention) in TIMM_ATTENTIONS
    return _reason_against_timms(attention) if is_timms else _reason_against_torchs(attention)


def _reason_against_class(attention: nn.Module, classes: set[str]) -> str:
    name = type(attention).__name__.lower()
    words = {*attention.state_dict(), *inspect.signature(attention.forward).parameters}
    if "window" in name:
        return "attends within windows, not over the whole grid"
    if any("rel_pos" in word or "relative_position" in word for word in words):
        return "already adds a relative position bias"
    if "rope" in words or "rotary" in name:
        return "already rotates queries and keys by position (RoPE)"
    timms = ["timm's Attention", "timm's EvaAttention"] if classes & TIMM_ATTENTIONS else []
    torchs = ["nn.MultiheadAttention"] if classes & TORCH_ATTENTIONS else []
    return f"is not {' or '.join(timms + torchs)}: what else it may compute would be lost"


def _reason_against_timms(attention: nn.Module) -> str:
    state = {name.split(".")[0] for name in attention.state_dict()}
    extra = sorted(state - _TIMM_STATE)
    arguments = set(inspect.signature(attention.forward).parameters)
    extra += sorted(arguments - _TIMM_ARGUMENTS)
    return f"also has {', '.join(extra)}, which would be lost" if extra else ""


def _reason_against_torchs(attention: nn.MultiheadAttention) -> str:
    if not attention._qkv_same_embed_dim:
        return "has keys or values of another width than its queries: it is no self-attention"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "adds a token to keys and values (add_bias_kv, add_zero_attn) that is on no grid"
    return ""
