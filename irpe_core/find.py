"""Finding the attentions of a model that `add_irpe` replaces, and its tokens before the grid."""

from collections.abc import Sequence

from torch import nn

from irpe_core import huggingface
from irpe_core.replaceable import TIMM_ATTENTIONS, class_path, reason_against

__all__ = ["choose_attentions", "has_blocks", "prefix_tokens"]


def prefix_tokens(model: nn.Module) -> int | None:
    """Return the number of tokens before the grid; None if the model does not have it."""
    attention = next(iter(huggingface.find_attentions(model).values()), None)
    if attention is not None:
        return huggingface.prefix_tokens(attention)
    return getattr(model, "num_prefix_tokens", None)


def _find(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attentions to replace by default, by name; the name of `model` itself is empty."""
    if isinstance(model, nn.MultiheadAttention) or class_path(model) in TIMM_ATTENTIONS:
        return {"": model}
    if has_blocks(model):
        return {
            f"blocks.{name}.{inner}": attention
            for name, block in model.blocks.named_children()
            for inner, attention in _attentions(block).items()
        }
    if found := huggingface.find_attentions(model):
        return found
    return {
        f"{name}.self_attn".removeprefix("."): layer.self_attn
        for name, layer in model.named_modules()
        if [n for n, _ in layer.named_children() if "attn" in n or "attention" in n]
        == ["self_attn"]
        and isinstance(layer.self_attn, nn.MultiheadAttention)
    }


def _attentions(block: nn.Module) -> dict[str, nn.Module]:
    """Return the `attn` of a block of timm, or all `attns.N.attn` of a parallel block, by name."""
    if hasattr(block, "attn"):
        return {"attn": block.attn}
    branches = getattr(block, "attns", None)
    branches = branches.named_children() if isinstance(branches, nn.ModuleList) else ()
    return {f"attns.{name}.attn": b.attn for name, b in branches if hasattr(b, "attn")}


def has_blocks(model: nn.Module) -> bool:
    """Return whether a model has a list of blocks with attentions, as timm's models have."""
    blocks = getattr(model, "blocks", None)
    is_list = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) > 0
    return is_list and all(_attentions(block) for block in blocks)


def choose_attentions(model: nn.Module, layers: Sequence[int | str] | None) -> dict[str, nn.Module]:
    """Return the attentions to replace, by name; raise ValueError if `layers` names none."""
    found = _find(model)
    if layers is None:
        if not found:
            raise ValueError(_nothing_found(model))
        return found
    names = list(found)
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {}
    several = isinstance(layers, Sequence) and not isinstance(layers, str)
    for layer in layers if several else [layers]:
        in_range = type(layer) is int and -len(names) <= layer < len(names)
        name = names[layer] if in_range else layer
        if not isinstance(name, str) or name not in modules:
            raise ValueError(
                f"layers must hold indices of the {len(names)} attentions found in "
                f"{type(model).__name__} or names of its modules, got {layer!r}"
            )
        chosen[name] = modules[name]
    if not chosen:
        raise ValueError("layers must name at least one attention, got none")
    return chosen


def _nothing_found(model: nn.Module) -> str:
    """Describe what a model has instead of an attention that add_irpe can find."""
    message = (
        f"add_irpe finds no blocks with attn and no layers with self_attn in {type(model).__name__}"
    )
    for name, module in model.named_modules():
        if hasattr(module, "num_prefix_tokens") and has_blocks(module):
            return f"{message}: call it on its {name}, which is a {type(module).__name__}"
    for name, module in model.named_modules():
        if name and any(word in type(module).__name__.lower() for word in ("attn", "attention")):
            reason = reason_against(module) or "can be named in layers="
            return f"{message}: its {name} ({class_path(module)}) {reason}"
    block = next(iter(getattr(model, "blocks", ())), None)
    return message if block is None else f"{message}: its blocks are {type(block).__name__}"
