"""Give iRPE to a model that was built without it."""

from collections.abc import Sequence

from torch import Tensor, nn

from irpe_core.config import RPEConfig, parse_rpe_spec
from irpe_core.modules import RPEAttention
from irpe_core.multihead import RPEMultiheadAttention
from irpe_core.replaceable import TIMM_ATTENTIONS, class_path, reason_against

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

    Found by themselves are `blocks[i].attn` of timm's vision transformers, EVA without RoPE among
    them, and every layer whose only attention is an `nn.MultiheadAttention` named `self_attn`, as
    in `nn.TransformerEncoder` and DETR's encoder; layers of a decoder, which have a second one, are
    left alone. The tables start at zero: until it is trained further, the model's outputs stay the
    same. Its state dict gains the tables and keeps every other name. Make the optimizer afterwards.

    Args:
        model: The model, or an attention, for which the replacement is returned.
        rpe: A spec such as `rpe-1.9-product-ctx-1-k`, or a configuration. In a spec, `skip` is the
            model's `num_prefix_tokens` (class and register tokens), or 0 for a model without that
            attribute; a configuration must have the same. An empty spec changes nothing.
        grid: `(height, width)` of the tokens behind the skipped ones, the same for every image; or
            the name of the module whose output `(B, C, height, width)` becomes the tokens, such as
            `"patch_embed.proj"`, which is followed from image to image. By default timm's
            `patch_embed` and DETR's `input_proj` are followed. Elsewhere the grid is `hw` of the
            caller, that of `set_grid`, or a square.
        layers: Which of the attentions found, by index, or any, by name, such as
            `["blocks.0.attn", "blocks.1.attn"]`; default all found.

    Returns:
        The same model, or for an attention its replacement.

    Raises:
        ValueError: The spec is malformed, no attention is found, or one computes what would be
            lost, such as a relative position bias of its own. The model is then as it was.
    """
    skip = getattr(model, "num_prefix_tokens", None)
    config = parse_rpe_spec(rpe, skip=skip or 0) if isinstance(rpe, str) else rpe
    if config is None:
        return model
    if not isinstance(config, RPEConfig):
        raise ValueError(f"rpe must be a spec or an RPEConfig, got {config!r}")
    if skip is not None and config.skip != skip:
        raise ValueError(f"rpe.skip must equal the model's {skip} prefix tokens, got {config.skip}")
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
            # It would pass on nested tensors, which have no grid.
            module.use_nested_tensor = False
    return model


def set_grid(module: nn.Module, grid: tuple[int, int] | None) -> None:
    """Tell every attention with iRPE in `module` the grid of the tokens to come.

    For a model that sees tokens alone, such as an `nn.TransformerEncoder`, and not always of one
    shape.

    Args:
        module: Holds `RPEAttention` or `RPEMultiheadAttention`.
        grid: `(height, width)`; None for a square.

    Raises:
        ValueError: There is no such attention, or the grid is malformed.
    """
    _check_grid(grid)
    attentions = [m for m in module.modules() if isinstance(m, _Attention)]
    if not attentions:
        raise ValueError(f"{type(module).__name__} has no attention with iRPE: use add_irpe first")
    for attention in attentions:
        attention.grid = grid


class _GridFollower:
    """Forward hook: tells every attention the grid of the current images.

    A block passes its attention nothing but tokens, and a model may change its image size at any
    time (`set_input_size`, `dynamic_img_size`). The grid is that of the latest images: with
    gradient checkpointing, go backward before images of another shape come forward.
    """

    def __init__(self, attentions: list[_Attention]) -> None:
        self.attentions = attentions

    def __call__(self, source: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if hasattr(source, "dynamic_feat_size"):
            grid = source.dynamic_feat_size(tuple(inputs[0].shape[-2:]))
        elif isinstance(output, Tensor) and output.dim() == 4:
            grid = tuple(output.shape[-2:])
        else:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                "the module that tells the grid must return (B, C, height, width), "
                f"{type(source).__name__} returned {shape}"
            )
        for attention in self.attentions:
            attention.grid = grid


def _find(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions to replace by default, by name, which is empty for the model itself."""
    if isinstance(model, nn.MultiheadAttention) or class_path(model) in TIMM_ATTENTIONS:
        return {"": model}
    if _has_blocks(model):
        return {f"blocks.{name}.attn": b.attn for name, b in model.blocks.named_children()}
    return {
        f"{name}.self_attn".removeprefix("."): layer.self_attn
        for name, layer in model.named_modules()
        if [n for n, _ in layer.named_children() if "attn" in n or "attention" in n]
        == ["self_attn"]
        and isinstance(layer.self_attn, nn.MultiheadAttention)
    }


def _has_blocks(model: nn.Module) -> bool:
    blocks = getattr(model, "blocks", None)
    is_list = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) > 0
    return is_list and all(hasattr(block, "attn") for block in blocks)


def _choose(model: nn.Module, layers: Sequence[int | str] | None) -> dict[str, nn.Module]:
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
    """Says of a model without known attention what it has instead."""
    message = f"add_irpe finds no blocks with attn and no layers with self_attn in {_name(model)}"
    for name, module in model.named_modules():
        if hasattr(module, "num_prefix_tokens") and _has_blocks(module):
            return f"{message}: call it on its {name}, which is a {_name(module)}"
    for name, module in model.named_modules():
        if name and any(word in type(module).__name__.lower() for word in ("attn", "attention")):
            reason = reason_against(module) or "can be named in layers="
            return f"{message}, whose {name} ({class_path(module)}) {reason}"
    block = next(iter(getattr(model, "blocks", ())), None)
    return message if block is None else f"{message}, whose blocks are {_name(block)}"


def _check(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raise ValueError where a replacement would not compute what the model does."""
    for name, attention in chosen.items():
        reason = reason_against(attention) or _reason_against_place(model, name)
        if reason:
            raise ValueError(f"{name or 'the module'} ({class_path(attention)}) {reason}")
    if getattr(model, "rope", None) is not None:
        raise ValueError(f"{_name(model)} already rotates queries and keys by position (RoPE)")
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        raise ValueError(
            f"{_name(model)} drops patches in training, and the others form no grid: "
            "build it with patch_drop_rate=0"
        )


def _reason_against_place(model: nn.Module, name: str) -> str:
    """Why an attention cannot have iRPE where it stands; empty where it can."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        owner = ".".join(parts[:depth])
        if hasattr(model.get_submodule(owner), "num_prefix_tokens"):
            return f"is part of {owner}, which knows its tokens and their grid: call add_irpe on it"
    neighbor = getattr(model.get_submodule(".".join(parts[:-1])), "self_attn", None)
    if name and parts[-1] != "self_attn" and isinstance(neighbor, nn.MultiheadAttention):
        return (
            "stands beside self_attn: it attends to other tokens, which share no grid with its own"
        )
    return ""


def _grid_source(model: nn.Module, grid: tuple[int, int] | str | None) -> nn.Module | None:
    """The module to follow, None where the grid is given or left to the caller."""
    if isinstance(grid, str):
        if grid not in dict(model.named_modules()):
            raise ValueError(f"grid={grid!r} is no module of {_name(model)}")
        return model.get_submodule(grid)
    _check_grid(grid)
    if grid is not None:
        return None
    if hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size"):
        return model.patch_embed
    if _has_blocks(model):
        raise ValueError(
            f"{_name(model)} has no patch_embed that tells the grid: pass grid=(height, width), or "
            "the name of the module that gives the feature map"
        )
    projection = getattr(model, "input_proj", None)
    return projection if isinstance(projection, nn.Conv2d) else None


def _has_irpe(module: nn.Module) -> bool:
    return any(isinstance(each, _Attention) for each in module.modules())


def _check_grid(grid: tuple[int, int] | None) -> None:
    if grid is None:
        return
    if (
        not isinstance(grid, (tuple, list))
        or len(grid) != 2
        or not all(type(side) is int and side >= 1 for side in grid)
    ):
        raise ValueError(f"grid must be (height, width), whole numbers >= 1, got {grid!r}")


def _equip(attention: nn.Module, config: RPEConfig, grid: tuple[int, int] | None) -> _Attention:
    is_torchs = isinstance(attention, nn.MultiheadAttention)
    kind = RPEMultiheadAttention if is_torchs else RPEAttention
    return kind.from_attention(attention, config, grid)


def _name(module: nn.Module) -> str:
    return type(module).__name__
