"""Adding iRPE to an existing model: find its attentions, replace them and pass them the grid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from irpe_core.config import RPEConfig, parse_rpe_spec
from irpe_core.modules import RPEAttention
from irpe_core.multihead import RPEMultiheadAttention
from irpe_core.replaceable import TIMM_ATTENTIONS, class_path, reason_against
from irpe_core.tracing import static_sizes

__all__ = ["add_irpe", "set_grid"]

_Attention = RPEAttention | RPEMultiheadAttention


def add_irpe(
    model: nn.Module,
    rpe: RPEConfig | str,
    *,
    grid: tuple[int, int] | str | None = None,
    layers: Sequence[int | str] | None = None,
) -> nn.Module:
    """Add iRPE to the self-attention of a vision transformer or an encoder, in place.

    The function finds `blocks[i].attn` of timm's vision transformers (also EVA, if without RoPE),
    `blocks[i].attns[j].attn` of those with parallel attentions, and every layer with a single attention, an `nn.MultiheadAttention` named `self_attn`, as in
    `nn.TransformerEncoder` and DETR's encoder. It leaves the layers of a decoder unchanged, because
    they have a second attention. The tables start at zero, so the outputs of the model stay the
    same until it is trained further. The state dict gains the tables and keeps all other names.
    Create the optimizer afterwards.

    Args:
        model: The model, or a single attention.
        rpe: A spec such as `rpe-1.9-product-ctx-1-k`, or a configuration. With a spec, `skip` is
            the `num_prefix_tokens` (class and register tokens) of the model, or 0 if it has no such
            attribute. A configuration must have the same `skip`. An empty spec changes nothing.
        grid: Height and width in tokens, without the skipped tokens, for all images. Or the name of
            the module that returns the feature map `(B, C, height, width)` of the tokens, such as
            `"patch_embed.proj"`: the grid is then read from its output for every batch. By default
            it is read from `patch_embed` of timm's models and `input_proj` of DETR. For other
            models the grid is `hw=` of the call, the grid of `set_grid`, or a square.
        layers: Indices of the attentions found, or names of any attentions, such as
            `["blocks.0.attn", "blocks.1.attn"]`; default all that are found.

    Returns:
        The same model; for a single attention, its replacement.

    Raises:
        ValueError: The spec is malformed, no attention is found, or an attention computes something
            that would be lost, such as a relative position bias. The model is then unchanged.
    """
    skip = getattr(model, "num_prefix_tokens", None)
    config = parse_rpe_spec(rpe, skip=skip or 0) if isinstance(rpe, str) else rpe
    if config is None:
        return model
    if not isinstance(config, RPEConfig):
        raise ValueError(f"rpe must be a spec or an RPEConfig, got {config!r}")
    if skip is not None and config.skip != skip:
        raise ValueError(f"rpe.skip must be {skip}, the model's prefix tokens, got {config.skip}")
    chosen = _choose(model, layers)
    _check(model, chosen)
    source = _grid_source(model, grid)
    start = grid if source is None else getattr(source, "grid_size", None)
    equipped = {name: _equip(old, config, start) for name, old in chosen.items()}
    if source is not None:
        source.register_forward_hook(_GridFollower(list(equipped.values())))
    for name, attention in equipped.items():
        if not name:
            return attention
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, attention)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _has_irpe(module):
            # It would pass nested tensors to its layers. They have no grid.
            module.use_nested_tensor = False
    return model


def set_grid(module: nn.Module, grid: tuple[int, int] | None) -> None:
    """Set the grid of the next inputs on every attention with iRPE in `module`.

    This is for models that receive only tokens, such as `nn.TransformerEncoder`, when the grid is
    not a square or changes from call to call.

    Args:
        module: A module that contains `RPEAttention` or `RPEMultiheadAttention`.
        grid: Height and width in tokens; None for a square.

    Raises:
        ValueError: The module contains no such attention, or the grid is malformed.
    """
    _check_grid(grid)
    attentions = [m for m in module.modules() if isinstance(m, _Attention)]
    if not attentions:
        raise ValueError(f"{_name(module)} has no attention with iRPE: call add_irpe first")
    for attention in attentions:
        attention.grid = grid


class _GridFollower:
    """A forward hook that sets the grid of the current images on every attention.

    A block passes only tokens to its attention, and the image size of a model may change at any
    time (`set_input_size`, `dynamic_img_size`). The grid is that of the latest forward pass. With
    gradient checkpointing, run the backward pass before a forward pass on images of another shape.
    """

    def __init__(self, attentions: list[_Attention]) -> None:
        self.attentions = attentions

    def __call__(self, source: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(output, torch.fx.Proxy):
            return  # torch.fx traces without images: the grid stays the one of the latest ones
        if hasattr(source, "dynamic_feat_size"):
            grid = source.dynamic_feat_size(static_sizes(inputs[0].shape[-2:]))
        elif isinstance(output, Tensor) and output.dim() == 4:
            grid = static_sizes(output.shape[-2:])
        else:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                "the output of the module that gives the grid must have the shape "
                f"(B, C, height, width), got {shape} from {_name(source)}"
            )
        for attention in self.attentions:
            attention.grid = grid


def _find(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attentions to replace by default, by name; the name of `model` itself is empty."""
    if isinstance(model, nn.MultiheadAttention) or class_path(model) in TIMM_ATTENTIONS:
        return {"": model}
    if _has_blocks(model):
        return {
            f"blocks.{name}.{inner}": attention
            for name, block in model.blocks.named_children()
            for inner, attention in _attentions(block).items()
        }
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


def _has_blocks(model: nn.Module) -> bool:
    """Return whether a model has a list of blocks with attentions, as timm's models have."""
    blocks = getattr(model, "blocks", None)
    is_list = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) > 0
    return is_list and all(_attentions(block) for block in blocks)


def _choose(model: nn.Module, layers: Sequence[int | str] | None) -> dict[str, nn.Module]:
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
                f"{_name(model)} or names of its modules, got {layer!r}"
            )
        chosen[name] = modules[name]
    if not chosen:
        raise ValueError("layers must name at least one attention, got none")
    return chosen


def _nothing_found(model: nn.Module) -> str:
    """Describe what a model has instead of an attention that add_irpe can find."""
    message = f"add_irpe finds no blocks with attn and no layers with self_attn in {_name(model)}"
    for name, module in model.named_modules():
        if hasattr(module, "num_prefix_tokens") and _has_blocks(module):
            return f"{message}: call it on its {name}, which is a {_name(module)}"
    for name, module in model.named_modules():
        if name and any(word in type(module).__name__.lower() for word in ("attn", "attention")):
            reason = reason_against(module) or "can be named in layers="
            return f"{message}: its {name} ({class_path(module)}) {reason}"
    block = next(iter(getattr(model, "blocks", ())), None)
    return message if block is None else f"{message}: its blocks are {_name(block)}"


def _check(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raise ValueError if a replacement would not compute what the model computes."""
    for name, attention in chosen.items():
        reason = reason_against(attention) or _reason_against_place(model, name)
        if reason:
            raise ValueError(f"{name or 'the module'} ({class_path(attention)}) {reason}")
    if getattr(model, "rope", None) is not None:
        raise ValueError(f"{_name(model)} already rotates queries and keys by position (RoPE)")
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        raise ValueError(
            f"{_name(model)} drops patches in training, and the rest does not form a grid: "
            "build it with patch_drop_rate=0"
        )


def _reason_against_place(model: nn.Module, name: str) -> str:
    """Return why an attention cannot have iRPE at its place in the model; empty if it can."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        owner = ".".join(parts[:depth])
        if hasattr(model.get_submodule(owner), "num_prefix_tokens"):
            return (
                f"is part of {owner}, which has the prefix tokens and the grid: call add_irpe on it"
            )
    neighbor = getattr(model.get_submodule(".".join(parts[:-1])), "self_attn", None)
    if name and parts[-1] != "self_attn" and isinstance(neighbor, nn.MultiheadAttention):
        return "is in a layer with self_attn: it attends to other tokens, which are on another grid"
    return ""


def _grid_source(model: nn.Module, grid: tuple[int, int] | str | None) -> nn.Module | None:
    """Return the module that gives the grid by its output; None if the caller gives the grid."""
    if isinstance(grid, str):
        if grid not in dict(model.named_modules()):
            raise ValueError(f"grid must be the name of a module of {_name(model)}, got {grid!r}")
        return model.get_submodule(grid)
    _check_grid(grid)
    if grid is not None:
        return None
    if hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size"):
        return model.patch_embed
    if _has_blocks(model):
        raise ValueError(
            f"{_name(model)} has no patch_embed that gives the grid: pass grid=(height, width), or "
            "the name of the module that returns the feature map"
        )
    projection = getattr(model, "input_proj", None)
    return projection if isinstance(projection, nn.Conv2d) else None


def _has_irpe(module: nn.Module) -> bool:
    """Return whether a module contains an attention with iRPE."""
    return any(isinstance(each, _Attention) for each in module.modules())


def _check_grid(grid: tuple[int, int] | None) -> None:
    """Raise ValueError unless the grid is None or two whole numbers >= 1."""
    if grid is None:
        return
    if (
        not isinstance(grid, (tuple, list))
        or len(grid) != 2
        or not all(type(side) is int and side >= 1 for side in grid)
    ):
        raise ValueError(f"grid must be (height, width), whole numbers >= 1, got {grid!r}")


def _equip(attention: nn.Module, config: RPEConfig, grid: tuple[int, int] | None) -> _Attention:
    """Return an attention with iRPE and with the layers of the given attention."""
    is_torch = isinstance(attention, nn.MultiheadAttention)
    kind = RPEMultiheadAttention if is_torch else RPEAttention
    return kind.from_attention(attention, config, grid)


def _name(module: nn.Module) -> str:
    """Return the class name of a module."""
    return type(module).__name__
