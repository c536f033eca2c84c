"""DETR: detect objects as a set, with a transformer on the features of a convolutional network.

    features = input_proj(backbone(images));  objects = transformer(features, queries)
    pred_logits = class_embed(objects);       pred_boxes = sigmoid(bbox_embed(objects))

Source: DETR (Carion et al., ECCV 2020), with iRPE (Wu et al., ICCV 2021) in the encoder. Parameter
names are those of the published checkpoints. It differs from the original in two points: images and
masks are plain tensors, and the heads always compute in the precision of their weights, because
boxes in bfloat16 are too coarse.
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
