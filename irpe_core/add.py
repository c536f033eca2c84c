"""Give iRPE to a model that was built without it."""

from torch import Tensor, nn

from irpe_core.config import RPEConfig, parse_rpe_spec
from irpe_core.modules import RPEAttention

__all__ = ["add_irpe"]


class _GridFollower:
    """Forward hook on a patch embedding: tells every attention the grid of the current images.

    A block passes its attention nothing but tokens, and a model may change its image size at any
    time (`set_input_size`, `dynamic_img_size`). The grid is that of the latest images: with
    gradient checkpointing, go backward before images of another shape come forward.
    """

    def __init__(self, attentions: list[RPEAttention]) -> None:
        self.attentions = attentions

    def __call__(self, patch_embed: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        grid = patch_embed.dynamic_feat_size(tuple(inputs[0].shape[-2:]))
        for attention in self.attentions:
            attention.grid = grid


def _check_model(model: nn.Module, grid: tuple[int, int] | None) -> None:
    missing = [name for name in ("num_prefix_tokens", "blocks") if not hasattr(model, name)]
    if grid is None and not hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size"):
        missing.append("patch_embed that tells the grid (pass grid=(height, width) instead)")
    if not all(hasattr(block, "attn") for block in getattr(model, "blocks", ())):
        missing.append("attn in every block")
    if missing:
        raise ValueError(
            "add_irpe needs a model like timm's VisionTransformer: "
            f"{type(model).__name__} has no {', no '.join(missing)}"
        )


def add_irpe(
    model: nn.Module, rpe: RPEConfig | str, *, grid: tuple[int, int] | None = None
) -> nn.Module:
    """Add iRPE to every block of a timm vision transformer, in place.

    The tables start at zero: until it is trained further, the model's outputs stay the same. The
    grid follows the images, square or not, unless it is given.

    Args:
        model: With `patch_embed`, `num_prefix_tokens` and `blocks[i].attn`, as timm's
            `VisionTransformer` has them.
        rpe: A spec such as `rpe-1.9-product-ctx-1-k`, for which `skip` is the model's number of
            prefix tokens, or a configuration, whose `skip` must equal it.
        grid: `(height, width)` of the tokens of every image, for a model whose `patch_embed` does
            not tell.

    Returns:
        The same model.

    Raises:
        ValueError: The spec is malformed, or the model is not of this form.
    """
    _check_model(model, grid)
    config = parse_rpe_spec(rpe, skip=model.num_prefix_tokens) if isinstance(rpe, str) else rpe
    if config is None:
        return model
    if config.skip != model.num_prefix_tokens:
        raise ValueError(
            f"rpe.skip must equal the model's {model.num_prefix_tokens} prefix tokens, "
            f"got {config.skip}"
        )
    start = grid or model.patch_embed.grid_size
    attentions = [RPEAttention.from_attention(b.attn, config, start) for b in model.blocks]
    for block, attention in zip(model.blocks, attentions, strict=True):
        block.attn = attention
    if grid is None:
        model.patch_embed.register_forward_hook(_GridFollower(attentions))
    return model
