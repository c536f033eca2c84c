"""DETR: objects as a set, by a transformer on the features of a convolutional network.

    features = input_proj(backbone(images));  objects = transformer(features, queries)
    pred_logits = class_embed(objects);       pred_boxes = sigmoid(bbox_embed(objects))

Source: DETR (Carion et al., ECCV 2020), with iRPE (Wu et al., ICCV 2021) in the encoder. Parameter
names are those of the published checkpoints. What differs: images and masks are plain tensors, and
the heads always compute in the precision of their weights, since bfloat16 boxes are coarse.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.backbone import Backbone, build_backbone
from detection.config import DetectionConfig
from detection.criterion import SetCriterion
from detection.matcher import HungarianMatcher
from detection.position_encoding import build_position_encoding
from detection.postprocess import PostProcess, PostProcessSegm
from detection.segmentation import DETRSegmentation
from detection.transformer import Transformer
from irpe_core import load_checkpoint, load_weights, parse_rpe_spec

__all__ = ["COCO_CLASSES", "DETR", "MLP", "Encoded", "build_model", "build_network"]

# COCO's 80 classes have ids up to 90.
COCO_CLASSES = 91


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        dims: Channels of the input, of what lies between, and of the output.
    """

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, dims[:-1], dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dims[0])` to `(..., dims[-1])`."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class Encoded(NamedTuple):
    """Images inside the model."""

    objects: Tensor
    """Outputs of every decoder layer, `(layers, B, Q, C)`."""
    memory: Tensor
    """The encoder's output `(B, C, h, w)`."""
    projected: Tensor
    """The encoder's input `(B, C, h, w)`."""
    mask: Tensor | None
    """`(B, h, w)`, True on padding."""
    levels: list[Tensor]
    """Features of the backbone, finest first."""


class DETR(nn.Module):
    """The detector.

    Args:
        backbone: Images to features.
        position_encoding: Mask of a feature map to its encodings.
        transformer: Features to objects.
        num_classes: Class labels run from 0 to `num_classes - 1`; one more stands for no object.
        num_queries: The most objects an image can hold.
        aux_loss: Also predict from the decoder layers before the last.
    """

    def __init__(
        self,
        backbone: Backbone,
        position_encoding: nn.Module,
        transformer: Transformer,
        num_classes: int,
        num_queries: int,
        aux_loss: bool = False,
    ) -> None:
        super().__init__()
        dim = transformer.dim
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP(dim, dim, dim, 4)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.channels[-1], dim, 1)
        self.backbone = nn.Sequential(backbone, position_encoding)
        self.aux_loss = aux_loss

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Detect objects.

        Args:
            images: `(B, 3, H, W)`, normalized; zero on padding.
            mask: `(B, H, W)`, True on padding; None where there is none.

        Returns:
            `pred_logits (B, Q, num_classes + 1)`, `pred_boxes (B, Q, 4)` as cx, cy, w, h relative
            to the image without its padding, and with `aux_loss` the same of every earlier layer
            as a list `aux_outputs`.
        """
        return self.predict(self.encode(images, mask).objects)

    def encode(self, images: Tensor, mask: Tensor | None = None, *, levels: int = 1) -> Encoded:
        """Everything before the heads; arguments as `forward`, `levels` as `Backbone.forward`."""
        backbone, encode_positions = self.backbone
        features = backbone(images, levels=levels)
        projected = self.input_proj(features[-1])
        hw = projected.shape[-2:]
        if mask is None:
            positions_of = projected.new_zeros((images.shape[0], *hw), dtype=torch.bool)
        else:
            mask = F.interpolate(mask[:, None].float(), size=hw)[:, 0].bool()
            positions_of = mask
        pos = encode_positions(positions_of).to(projected.dtype)
        objects, memory = self.transformer(projected, mask, self.query_embed.weight, pos)
        return Encoded(objects, memory, projected, mask, features)

    def predict(self, objects: Tensor) -> dict[str, Any]:
        """Classes and boxes of `objects (layers, B, Q, C)`; returns what `forward` does."""
        with torch.autocast(objects.device.type, enabled=False):
            objects = objects.to(self.class_embed.weight.dtype)
            logits = self.class_embed(objects)
            boxes = self.bbox_embed(objects).sigmoid()
        outputs: dict[str, Any] = {"pred_logits": logits[-1], "pred_boxes": boxes[-1]}
        if self.aux_loss:
            outputs["aux_outputs"] = [
                {"pred_logits": layer_logits, "pred_boxes": layer_boxes}
                for layer_logits, layer_boxes in zip(logits[:-1], boxes[:-1], strict=True)
            ]
        return outputs


def build_model(
    config: DetectionConfig, *, load: bool = True
) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Model, losses and post-processing of a detection configuration, on the CPU.

    Args:
        config: The configuration.
        load: As for `build_network`.

    Returns:
        `(model, criterion, postprocessors)`; the post-processors are `bbox` and with masks `segm`.

    Raises:
        ValueError: Options that do not go together.
        CheckpointError: Weights that cannot be read or do not fit.
    """
    matcher = HungarianMatcher(config.set_cost_class, config.set_cost_bbox, config.set_cost_giou)
    weights = {
        "loss_ce": config.cls_loss_coef,
        "loss_bbox": config.bbox_loss_coef,
        "loss_giou": config.giou_loss_coef,
    }
    losses = ["labels", "boxes", "cardinality"]
    postprocessors: dict[str, nn.Module] = {"bbox": PostProcess()}
    if config.masks:
        weights |= {"loss_mask": config.mask_loss_coef, "loss_dice": config.dice_loss_coef}
        losses.append("masks")
        postprocessors["segm"] = PostProcessSegm()
    if config.aux_loss:
        weights |= {
            f"{name}_{layer}": weight
            for layer in range(config.dec_layers - 1)
            for name, weight in weights.items()
        }
    criterion = SetCriterion(_num_classes(config), matcher, weights, config.eos_coef, losses)
    return build_network(config, load=load), criterion, postprocessors


def build_network(config: DetectionConfig, *, load: bool = True) -> nn.Module:
    """The network of a detection configuration: `DETR`, or with `masks` `DETRSegmentation`.

    Args:
        config: The configuration.
        load: Load the weights of the backbone and of `frozen_weights`; without it they are left
            random, for a model whose weights come from a checkpoint.

    Raises:
        ValueError: Options that do not go together.
        CheckpointError: Weights that cannot be read or do not fit.
    """
    detr = DETR(
        build_backbone(config, load=load),
        build_position_encoding(config.position_embedding, config.hidden_dim),
        Transformer(
            config.hidden_dim,
            config.nheads,
            config.enc_layers,
            config.dec_layers,
            config.dim_feedforward,
            config.dropout,
            pre_norm=config.pre_norm,
            rpe=parse_rpe_spec(config.enc_rpe2d),
        ),
        _num_classes(config),
        config.num_queries,
        config.aux_loss,
    )
    if not config.masks:
        return detr
    if config.frozen_weights and load:
        load_weights(detr, load_checkpoint(config.frozen_weights)["model"])
    return DETRSegmentation(detr, freeze_detr=bool(config.frozen_weights))


def _num_classes(config: DetectionConfig) -> int:
    return COCO_CLASSES if config.num_classes is None else config.num_classes
