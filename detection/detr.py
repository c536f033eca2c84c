"""DETR: object detection with a transformer on the features of a convolutional network.

    features = input_proj(backbone(images));  objects = transformer(features, queries)
    pred_logits = class_embed(objects);       pred_boxes = sigmoid(bbox_embed(objects))

Parameter names are those of the published checkpoints. Two things differ from the original: images
and masks are plain tensors, and the heads compute in the data type of their weights, because
bfloat16 is too coarse for boxes.

Source: DETR (Carion et al., ECCV 2020), with iRPE (Wu et al., ICCV 2021) in the encoder.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.backbone import Backbone
from detection.transformer import Transformer

__all__ = ["DETR", "MLP", "Encoded"]


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        dims: Number of channels of the input, of each hidden layer and of the output.
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
    """Results of the model before its heads."""

    objects: Tensor
    """Outputs of every decoder layer, `(layers, B, Q, C)`."""
    memory: Tensor
    """Output of the encoder, `(B, C, h, w)`."""
    projected: Tensor
    """Input of the encoder, `(B, C, h, w)`."""
    mask: Tensor | None
    """Mask `(B, h, w)`, True on padding; None without padding."""
    levels: list[Tensor]
    """Features of the backbone, finest first."""


class DETR(nn.Module):
    """The detector.

    Args:
        backbone: Module from images to features.
        position_encoding: Module from the mask of a feature map to its position encodings.
        transformer: Module from features to objects.
        num_classes: Number of classes without no-object.
        num_queries: Number of object queries, the maximum number of detections per image.
        aux_loss: Also return the predictions of the earlier decoder layers.
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass instead of storing their activations."""
        self.backbone[0].set_grad_checkpointing(enable)
        for part in (self.transformer.encoder, self.transformer.decoder):
            part.grad_checkpointing = enable

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Detect objects.

        Args:
            images: Normalized images `(B, 3, H, W)`, zero on padding.
            mask: Mask `(B, H, W)`, True on padding; None without padding.

        Returns:
            `pred_logits (B, Q, num_classes + 1)`; `pred_boxes (B, Q, 4)` as (cx, cy, w, h) relative
            to the image without padding; with `aux_loss` also `aux_outputs`, a list with the same
            entries of every earlier decoder layer.
        """
        return self.predict(self.encode(images, mask).objects)

    def encode(self, images: Tensor, mask: Tensor | None = None, *, levels: int = 1) -> Encoded:
        """Run the model up to its heads.

        Args:
            images: See `forward`.
            mask: See `forward`.
            levels: Number of levels of backbone features to return, counted from the coarsest.
        """
        backbone, encode_positions = self.backbone
        features = backbone(images, levels=levels)
        projected = self.input_proj(features[-1])
        hw = projected.shape[-2:]
        if mask is None:
            padding = projected.new_zeros((images.shape[0], *hw), dtype=torch.bool)
        else:
            padding = mask = F.interpolate(mask[:, None].float(), size=hw)[:, 0].bool()
        pos = encode_positions(padding).to(projected.dtype)
        objects, memory = self.transformer(projected, mask, self.query_embed.weight, pos)
        return Encoded(objects, memory, projected, mask, features)

    def predict(self, objects: Tensor) -> dict[str, Any]:
        """Predict classes and boxes of `objects (layers, B, Q, C)`, in the form of `forward`."""
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
