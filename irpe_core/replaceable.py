"""The attention classes that iRPE can replace, and reasons against replacing others.

As long as its tables are zero, a replacement must compute exactly what the original computes. This
is only known for the classes below. Names of layers and parameters are not enough: a subclass or a
hook may change the result and have the same parameters.
"""

import inspect

from torch import nn

__all__ = [
    "TIMM_ATTENTIONS",
    "TORCH_ATTENTIONS",
    "TRANSFORMERS_ATTENTIONS",
    "class_path",
    "check_replaceable",
    "reason_against",
]

TIMM_ATTENTIONS = {
    "timm.layers.attention.Attention",
    "timm.models.vision_transformer.Attention",  # older releases of timm
    "timm.models.eva.EvaAttention",
    "irpe_core.modules.RPEAttention",
}
TORCH_ATTENTIONS = {
    "torch.nn.modules.activation.MultiheadAttention",
    "irpe_core.multihead.RPEMultiheadAttention",
}
# Number of class and distillation tokens by class.
TRANSFORMERS_ATTENTIONS = {
    "transformers.models.vit.modeling_vit.ViTAttention": 1,
    "transformers.models.deit.modeling_deit.DeiTAttention": 2,
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": 1,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersAttention": 1,
    "transformers.models.detr.modeling_detr.DetrSelfAttention": 0,
}

# Parameters, buffers and modules, and arguments, of the two classes of timm.
_TIMM_STATE = {
    *("qkv", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias"),
    *("q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"),
}
_TRANSFORMERS_STATE = {"q_proj", "k_proj", "v_proj", "o_proj"}
_TIMM_ARGUMENTS = {"x", "rope", "attn_mask", "is_causal"}


def class_path(module: nn.Module) -> str:
    """Return the full name of the class of a module, `package.module.Class`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_replaceable(attention: nn.Module, classes: set[str]) -> None:
    """Raise ValueError, with the reason, if iRPE cannot replace `attention`."""
    reason = reason_against(attention, classes)
    if reason:
        raise ValueError(f"{class_path(attention)} {reason}")


def reason_against(
    attention: nn.Module,
    classes: set[str] = TIMM_ATTENTIONS | TORCH_ATTENTIONS | {*TRANSFORMERS_ATTENTIONS},
) -> str:
    """Return why iRPE cannot replace an attention; empty if it can.

    Args:
        attention: The module.
        classes: Full names of the classes that can be replaced.
    """
    own = [getattr(attention, name, None) for name in ("rpe_q", "rpe_k", "rpe_v")]
    if any(table is not None for table in own):
        return "already has iRPE"
    if class_path(attention) not in classes:
        return _reason_against_class(attention, classes)
    if any(hooks for name, hooks in vars(attention).items() if name.endswith("_hooks")):
        return "has hooks, which would be lost: register them after add_irpe"
    if "forward" in vars(attention):
        return "has a forward that is not the one of its class"
    if class_path(attention) in TRANSFORMERS_ATTENTIONS:
        return _reason_against_transformers(attention)
    is_timm = class_path(attention) in TIMM_ATTENTIONS
    return _reason_against_timm(attention) if is_timm else _reason_against_torch(attention)


def _reason_against_class(attention: nn.Module, classes: set[str]) -> str:
    """Describe why an attention of an unsupported class cannot be replaced."""
    name = type(attention).__name__.lower()
    words = {*attention.state_dict(), *inspect.signature(attention.forward).parameters}
    if "window" in name:
        return "attends within windows, not over the whole grid"
    if any("rel_pos" in word or "relative_position" in word for word in words):
        return "already adds a relative position bias"
    if "rope" in words or "rotary" in name:
        return "already rotates queries and keys by position (RoPE)"
    names = ["timm's Attention", "timm's EvaAttention"] if classes & TIMM_ATTENTIONS else []
    names += ["nn.MultiheadAttention"] if classes & TORCH_ATTENTIONS else []
    return f"is not {' or '.join(names)}: anything else that it computes would be lost"


def _reason_against_timm(attention: nn.Module) -> str:
    """Return why an attention of timm cannot be replaced; empty if it can."""
    state = {name.split(".")[0] for name in attention.state_dict()}
    extra = sorted(state - _TIMM_STATE)
    arguments = set(inspect.signature(attention.forward).parameters)
    extra += sorted(arguments - _TIMM_ARGUMENTS)
    return f"also has {', '.join(extra)}, which would be lost" if extra else ""


def _reason_against_transformers(attention: nn.Module) -> str:
    """Return why an attention of transformers cannot be replaced; empty if it can."""
    state = {name.split(".")[0] for name in attention.state_dict()}
    if state == _TRANSFORMERS_STATE:
        return ""
    return (
        f"must have {', '.join(sorted(_TRANSFORMERS_STATE))}, got {', '.join(sorted(state))}: "
        "install transformers>=5"
    )


def _reason_against_torch(attention: nn.MultiheadAttention) -> str:
    """Return why an `nn.MultiheadAttention` cannot be replaced; empty if it can."""
    if not attention._qkv_same_embed_dim:
        return "has keys or values of another width than its queries: it is not self-attention"
    if attention.bias_k is not None or attention.add_zero_attn:
        return (
            "adds a token to keys and values (add_bias_kv, add_zero_attn) that is not on the grid"
        )
    return ""
