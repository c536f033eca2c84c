"""Adding iRPE to an existing model: replace its attentions and pass them the grid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from irpe_core.config import RPEConfig, parse_rpe_spec
from irpe_core.find import choose_attentions, has_blocks, prefix_tokens
from irpe_core.huggingface import RPETransformersAttention, find_projection
from irpe_core.modules import RPEAttention
from irpe_core.multihead import RPEMultiheadAttention
from irpe_core.replaceable import TRANSFORMERS_ATTENTIONS, class_path, reason_against
from irpe_core.tracing import static_sizes

__all__ = ["add_irpe", "set_grid"]

_Attention = RPEAttention | RPEMultiheadAttention | RPETransformersAttention


def add_irpe(
    model: nn.Module,
    rpe: RPEConfig | str,
    *,
    grid: tuple[int, int] | str | None = None,
    layers: Sequence[int | str] | None = None,
) -> nn.Module:
    """Add iRPE to the self-attention of a vision transformer or an encoder, in place.

    The function finds `blocks[i].attn` of timm's vision transformers (also EVA, if without RoPE),
    `blocks[i].attns[j].attn` of those with parallel attentions, the attentions of Hugging Face's
    ViT, DeiT, DINOv2 and DETR encoder, and every layer with a single attention, an
    `nn.MultiheadAttention` named `self_attn`, as in `nn.TransformerEncoder` and DETR's encoder. It
    leaves the layers of a decoder unchanged, because they have a second attention. The tables start
    at zero, so the outputs of the model stay the same until it is trained further. The state dict
    gains the tables and keeps all other names. Create the optimizer afterwards.

    Args:
        model: The model, or a single attention.
        rpe: A spec such as `rpe-1.9-product-ctx-1-k`, or a configuration. With a spec, `skip` is
            the number of class, distillation and register tokens of a model of timm or Hugging
            Face, otherwise 0. A configuration must have the same `skip`. An empty spec changes
            nothing.
        grid: Height and width in tokens, without the skipped tokens, for all images. Or the name of
            the module that returns the feature map `(B, C, height, width)` of the tokens, such as
            `"patch_embed.proj"`: the grid is then read from its output for every batch. By default
            it is read from `patch_embed` of timm's models, from the patch embedding of Hugging
            Face's, and from the input projection of DETR. For other models the grid is `hw=` of the
            call, the grid of `set_grid`, or a square.
        layers: Indices of the attentions found, or names of any attentions, such as
            `["blocks.0.attn", "blocks.1.attn"]`; default all that are found.

    Returns:
        The same model; for a single attention, its replacement.

    Raises:
        ValueError: The spec is malformed, no attention is found, or an attention computes something
            that would be lost, such as a relative position bias. The model is then unchanged.
    """
    skip = prefix_tokens(model)
    config = parse_rpe_spec(rpe, skip=skip or 0) if isinstance(rpe, str) else rpe
    if config is None:
        return model
    if not isinstance(config, RPEConfig):
        raise ValueError(f"rpe must be a spec or an RPEConfig, got {config!r}")
    if skip is not None and config.skip != skip:
        raise ValueError(f"rpe.skip must be {skip}, the model's prefix tokens, got {config.skip}")
    chosen = choose_attentions(model, layers)
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
            return  # torch.fx traces without images: keep the latest grid
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
    if has_blocks(model):
        raise ValueError(
            f"{_name(model)} has no patch_embed that gives the grid: pass grid=(height, width), or "
            "the name of the module that returns the feature map"
        )
    projection = getattr(model, "input_proj", None)
    if isinstance(projection, nn.Conv2d):
        return projection
    return find_projection(model)


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
    if class_path(attention) in TRANSFORMERS_ATTENTIONS:
        return RPETransformersAttention(attention, config, grid)
    is_torch = isinstance(attention, nn.MultiheadAttention)
    kind = RPEMultiheadAttention if is_torch else RPEAttention
    return kind.from_attention(attention, config, grid)


def _name(module: nn.Module) -> str:
    """Return the class name of a module."""
    return type(module).__name__
