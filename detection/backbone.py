"""The backbone, which computes the feature map: a ResNet of torchvision, or a small network.

The published detectors have ImageNet weights and frozen batch norms. They train `layer2` to
`layer4`; the stem and `layer1` are frozen. Trained batch norms, stride 16 and other weights are
additions, for training from scratch on small images.

Source: DETR (Carion et al., ECCV 2020), section 4.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

from detection.config import DetectionConfig
from detection.recompute import run_layer
from irpe_core import load_checkpoint, load_weights

__all__ = ["Backbone", "build_backbone"]

_SMALL_CHANNELS = (16, 32, 64, 128)
# The stages that end a level of features.
_LEVELS = ("relu", "layer1", "layer2", "layer3", "layer4")
_FROZEN_STAGES = ("conv1", "bn1", "layer1")


class Backbone(nn.Module):
    """A sequence of stages with an output for each level of features.

    Args:
        body: Named stages; a level of features ends at `relu` and at each `layerN`.
        channels: Number of channels of every level, finest first.
    """

    def __init__(self, body: nn.Sequential, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        self.channels = channels
        self.grad_checkpointing = False

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; a frozen backbone stays in evaluation mode and keeps its statistics."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass, unless they have trained batch norms.

        Recomputing these would update their statistics twice.
        """
        trains_norms = any(isinstance(module, nn.BatchNorm2d) for module in self.modules())
        self.grad_checkpointing = enable and not trains_norms

    def forward(self, images: Tensor, *, levels: int = 1) -> list[Tensor]:
        """Extract features.

        Args:
            images: Normalized images `(B, 3, H, W)`.
            levels: Number of levels to return, counted from the coarsest.

        Returns:
            Features `(B, C, h, w)` of each level, finest first.
        """
        returned = [name for name, _ in self.body.named_children() if name in _LEVELS][-levels:]
        features = []
        x = images
        for name, stage in self.body.named_children():
            # Frozen stages store nothing for the backward pass.
            recompute = self.grad_checkpointing and any(p.requires_grad for p in stage.parameters())
            for block in stage if isinstance(stage, nn.Sequential) else [stage]:
                x = run_layer(block, x, recompute=recompute)
            if name in returned:
                features.append(x)
        return features


def build_backbone(config: DetectionConfig, *, load: bool = True) -> Backbone:
    """Build the backbone.

    Args:
        config: The configuration; the group Backbone and `lr_backbone` are used.
        load: Load the weights. False keeps them random, for a model that gets its weights from a
            checkpoint.

    Raises:
        ValueError: The options contradict each other.
        CheckpointError: The weights cannot be read or do not fit.
    """
    _check_options(config, load)
    norm = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d}[config.backbone_norm]
    build = _build_small if config.backbone == "small" else _build_resnet
    backbone = build(config, norm)
    if load and config.backbone_weights != "none":
        _load(backbone.body, config)
    _freeze(backbone, config)
    return backbone


def _check_options(config: DetectionConfig, load: bool) -> None:
    """Refuse options that contradict each other."""
    if config.dilation and config.backbone in ("resnet18", "resnet34", "small"):
        raise ValueError(
            f"backbone must be resnet50 or resnet101 with dilation, got {config.backbone!r}"
        )
    if config.dilation and config.backbone_stride == 16:
        raise ValueError(
            "backbone_stride must be 32 with dilation, which needs the last stage, got 16"
        )
    if load and config.backbone == "small" and config.backbone_weights == "imagenet":
        raise ValueError(
            "backbone_weights must be none or a file with backbone 'small', which has no ImageNet "
            "weights, got 'imagenet'"
        )


def _build_resnet(config: DetectionConfig, norm: Callable[[int], nn.Module]) -> Backbone:
    """Build a ResNet without its head, and without `layer4` at stride 16."""
    net: ResNet = torchvision.models.get_model(
        config.backbone,
        weights=None,
        norm_layer=norm,
        replace_stride_with_dilation=[False, False, config.dilation],
    )
    last = "layer4" if config.backbone_stride == 32 else "layer3"
    names = [name for name, _ in net.named_children()]
    stages = names[: names.index(last) + 1]
    widths = [64 * 2**i * net.layer1[0].expansion for i in range(4)]
    body = nn.Sequential(OrderedDict((name, getattr(net, name)) for name in stages))
    return Backbone(body, (64, *widths[: sum(name in _LEVELS for name in stages) - 1]))


def _build_small(config: DetectionConfig, norm: Callable[[int], nn.Module]) -> Backbone:
    """Build a convolution and three basic blocks, each of which halves the resolution."""
    conv = partial(nn.Conv2d, stride=2, bias=False)
    stem = _SMALL_CHANNELS[0]
    stages = OrderedDict(conv1=conv(3, stem, 3, padding=1), bn1=norm(stem), relu=nn.ReLU())
    for number, (before, after) in enumerate(pairwise(_SMALL_CHANNELS), 1):
        shortcut = nn.Sequential(conv(before, after, 1), norm(after))
        stages[f"layer{number}"] = BasicBlock(before, after, 2, shortcut, norm_layer=norm)
    body = nn.Sequential(stages)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Backbone(body, _SMALL_CHANNELS)


def _load(body: nn.Sequential, config: DetectionConfig) -> None:
    """Load the weights of an ImageNet classifier, except for its head and removed stages."""
    source = config.backbone_weights
    if source == "imagenet":
        source = torchvision.models.get_model_weights(config.backbone).IMAGENET1K_V1.url
    stages = dict(body.named_children())
    counters = "num_batches_tracked"
    weights = {
        name: value
        for name, value in load_checkpoint(source)["model"].items()
        if name.split(".")[0] in stages and not name.endswith(counters)
    }
    weights |= {name: v for name, v in body.state_dict().items() if name.endswith(counters)}
    load_weights(body, weights)


def _freeze(backbone: Backbone, config: DetectionConfig) -> None:
    """Freeze all stages if `lr_backbone` is 0; with frozen norms the first stages, as in DETR."""
    if config.lr_backbone <= 0:
        backbone.requires_grad_(False)
    elif config.backbone_norm == "frozen":
        for name in _FROZEN_STAGES:
            getattr(backbone.body, name).requires_grad_(False)
