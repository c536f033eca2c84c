"""DeiT with iRPE: the published models in timm's registry, and other models by options.

A published model is timm's DeiT with iRPE in the attention of every block. It keeps the learned
absolute position embedding and timm's parameter names, and adds `blocks.N.attn.rpe_*`. One thing
differs from timm: the class token is initialized with standard deviation 0.02, as in DeiT, instead
of near zero. The models are built by timm's `build_model_with_cfg`, so `timm.create_model` has the
same options for them as for timm's DeiT.

Source: DeiT (Touvron et al., ICML 2021) and iRPE (Wu et al., ICCV 2021).
"""

import logging
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from classification.pretrained import adapt_pretrained, read_source
from classification.rope import ROPE, add_rope
from classification.sine import use_sine_embedding
from irpe_core import CheckpointError, add_irpe

# timm adds the names of the published models when they are registered below.
__all__ = [
    "PUBLISHED",
    "VisionTransformerIRPE",
    "VisionTransformerIRPEDistilled",
    "build_model",
    "is_deit",
]

logger = logging.getLogger(__name__)

# Model name → (size, spec).
PUBLISHED = {
    "deit_tiny_patch16_224_ctx_product_50_shared_k": ("tiny", "rpe-1.9-product-ctx-1-k"),
    "deit_small_patch16_224_ctx_product_50_shared_k": ("small", "rpe-1.9-product-ctx-1-k"),
    "deit_small_patch16_224_ctx_product_50_shared_qk": ("small", "rpe-1.9-product-ctx-1-qk"),
    "deit_small_patch16_224_ctx_product_50_shared_qkv": ("small", "rpe-1.9-product-ctx-1-qkv"),
    "deit_base_patch16_224_ctx_product_50_shared_k": ("base", "rpe-1.9-product-ctx-1-k"),
    "deit_base_patch16_224_ctx_product_50_shared_qkv": ("base", "rpe-1.9-product-ctx-1-qkv"),
    "deit_small_patch16_224_ctx_euc_20_shared_k": ("small", "rpe-20.0-euc-ctx-1-k"),
    "deit_small_patch16_224_ctx_quant_51_shared_k": ("small", "rpe-33.0-quant-ctx-1-k"),
    "deit_small_patch16_224_ctx_cross_56_shared_k": ("small", "rpe-20.0-cross-ctx-1-k"),
}
_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
_WITHOUT_CHECKPOINT = {
    "deit_small_patch16_224_ctx_euc_20_shared_k",
    "deit_small_patch16_224_ctx_quant_51_shared_k",
    "deit_small_patch16_224_ctx_cross_56_shared_k",
}
_RELEASE = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0"


def _pretrained_cfg(name: str) -> dict:
    """Return what timm records about a published model: its input and the URL of its weights."""
    return {
        "url": "" if name in _WITHOUT_CHECKPOINT else f"{_RELEASE}/{name}.pth",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs({name: _pretrained_cfg(name) for name in PUBLISHED})


def is_deit(name: str) -> bool:
    """Return True for the name of a DeiT, published or of timm."""
    return name.startswith("deit_")


def _initialize_as_deit(model: nn.Module) -> nn.Module:
    """Initialize the class token as in DeiT; a model may have none."""
    if model.cls_token is not None:
        nn.init.trunc_normal_(model.cls_token, std=0.02)
    return model


class _WithIRPE:
    """The part that both classes below add to a vision transformer of timm."""

    def __init__(self, *args, rpe: str, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        add_irpe(self, rpe)

    def init_weights(self, *args, **kwargs) -> None:
        """Initialize the weights as timm, and the class token as DeiT."""
        super().init_weights(*args, **kwargs)
        _initialize_as_deit(self)


class VisionTransformerIRPE(_WithIRPE, VisionTransformer):
    """timm's `VisionTransformer` with iRPE in every block; `rpe` is the spec."""


class VisionTransformerIRPEDistilled(_WithIRPE, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled` with iRPE in every block; `rpe` is the spec."""


def _create_deit(
    name: str, pretrained: bool = False, *, distilled: bool = False, **kwargs
) -> nn.Module:
    """Create a published model by timm's builder; `kwargs` are those of `timm.create_model`."""
    size, spec = PUBLISHED[name]
    overlay = {"classifier": ("head", "head_dist")} if distilled else {}
    overlay |= kwargs.pop("pretrained_cfg_overlay", None) or {}
    weights = image_size = None
    if pretrained:
        source = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
        weights, image_size = read_source(source, kwargs.get("cache_dir"))
    if weights is not None:
        overlay["state_dict"] = weights
    model = build_model_with_cfg(
        VisionTransformerIRPEDistilled if distilled else VisionTransformerIRPE,
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=partial(adapt_pretrained, image_size=image_size),
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{"patch_size": 16, "rpe": spec, **_SIZES[size], **kwargs},
    )
    if weights is not None:
        # The model has its own copy now. features_only wraps it in a module with another dict.
        for module in model.modules():
            vars(module).get("pretrained_cfg", {}).pop("state_dict", None)
    return model


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """Return the function that timm's registry calls to build a published model."""

    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create_deit(name, pretrained, **kwargs)

    size, spec = PUBLISHED[name]
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build DeiT-{size} with `{spec}`."
    return register_model(build)


globals().update({name: _entrypoint(name) for name in PUBLISHED})


def build_model(
    name: str,
    *,
    num_classes: int,
    input_size: tuple[int, int],
    pretrained: bool = False,
    rpe: str = "",
    abs_pos_embed: bool | Literal["sine"] = True,
    distillation_token: bool = False,
    **kwargs,
) -> nn.Module:
    """Create a classifier from timm's registry, with a position encoding by name or by options.

    Args:
        name: Name of a published model, or of a vision transformer in timm's registry.
        num_classes: Number of classes.
        input_size: Height and width of the images in pixels.
        pretrained: Load the published weights; those of timm for a model of timm.
        rpe: Spec of the iRPE to add, such as `rpe-1.9-product-ctx-1-k`; its tables start at zero.
            `rope` adds the rotary position embedding. Empty adds none.
        abs_pos_embed: Keep the learned absolute position embedding, or replace it by fixed sines
            and cosines with `sine`.
        distillation_token: Add DeiT's distillation token and its head (DeiT models only).
        **kwargs: Arguments for timm, such as `drop_path_rate`, `patch_size`, `embed_dim`, `depth`.

    Raises:
        ValueError: An option does not fit the model.
        CheckpointError: The published weights cannot be loaded or do not fit.
    """
    if rpe and name in PUBLISHED:
        raise ValueError(
            f"rpe must be empty for model {name!r}, which already has iRPE, got {rpe!r}"
        )
    if abs_pos_embed == "sine" and pretrained:
        raise ValueError(
            "abs_pos_embed must be true with pretrained weights, which have a learned position "
            "embedding, got 'sine'"
        )
    if distillation_token:
        name, kwargs = _with_distillation_token(name, kwargs)
    if not abs_pos_embed and not distillation_token:
        kwargs["pos_embed"] = "none"
    if pretrained and name not in PUBLISHED:
        logger.info("timm loads the weights of %s, and downloads them if they are not cached", name)
    try:
        with _without_hub_warnings():
            model = timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, img_size=input_size, **kwargs
            )
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = textwrap.shorten(str(error), 400)
        raise CheckpointError(f"timm cannot load the weights of {name!r}: {reason}") from error
    if is_deit(name) and name not in PUBLISHED and not pretrained:
        _initialize_as_deit(model)
    if not abs_pos_embed and distillation_token:
        # timm's distilled DeiT cannot leave out the position embedding, so zero takes its place.
        del model.pos_embed
        model.register_buffer("pos_embed", torch.zeros(1, 1, 1), persistent=False)
    if abs_pos_embed == "sine":
        use_sine_embedding(model)
    if rpe == ROPE:
        return add_rope(model)
    if pretrained and rpe:
        logger.info("the weights of %s have no iRPE: its tables start at zero", name)
    return add_irpe(model, rpe)


@contextmanager
def _without_hub_warnings() -> Iterator[None]:
    """Hide the warnings of the Hugging Face hub about each retry; its last error is raised."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _with_distillation_token(name: str, kwargs: dict) -> tuple[str, dict]:
    """Return the name and the arguments of the same model with a distillation token."""
    if name in PUBLISHED:
        return name, {**kwargs, "distilled": True}
    distilled = name.replace("_patch16", "_distilled_patch16")
    if "_distilled_" in name:
        return name, kwargs
    if not is_deit(name) or not timm.is_model(distilled):
        raise ValueError(
            f"distillation_token must be false for model {name!r}, which has no distilled variant "
            "in timm, got true"
        )
    return distilled, kwargs
