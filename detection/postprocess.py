"""Post-processing: from model outputs to detections in pixels of the original image.

Every query gives one detection, with its most probable class other than no-object. There is no
non-maximum suppression.

Source: DETR (Carion et al., ECCV 2020).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.boxes import cxcywh_to_xyxy

__all__ = ["PostProcess", "PostProcessSegm"]

# Masks are resized for so many queries at a time, to save memory: 4 bytes per pixel and query.
_QUERIES_AT_ONCE = 32


class PostProcess(nn.Module):
    """Scores, labels and absolute boxes of every query."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """Convert outputs to detections.

        Args:
            outputs: `pred_logits` `(B, Q, C+1)` and `pred_boxes` `(B, Q, 4)`.
            sizes: Height and width `(B, 2)` in pixels to scale the boxes to; in evaluation those of
                the original images.

        Returns:
            For every image `scores` `(Q,)`, `labels` `(Q,)` and `boxes` `(Q, 4)` as
            (x1, y1, x2, y2) in pixels.

        Raises:
            ValueError: The shape of `sizes` is wrong.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        _check_sizes(sizes, len(logits), "sizes")
        scores, labels = logits.float().softmax(-1)[..., :-1].max(-1)
        height, width = sizes.to(boxes.device).unbind(1)
        scale = torch.stack([width, height, width, height], dim=1)
        absolute = cxcywh_to_xyxy(boxes.float()) * scale[:, None]
        columns = zip(scores, labels, absolute, strict=True)
        return [{"scores": s, "labels": n, "boxes": b} for s, n, b in columns]


class PostProcessSegm(nn.Module):
    """Binary masks of every query.

    Args:
        threshold: Probability above which a pixel belongs to the object, in (0, 1).

    Raises:
        ValueError: The threshold is out of range.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}")
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        results: list[dict[str, Tensor]],
        outputs: dict[str, Tensor],
        original_sizes: Tensor,
        sizes: Tensor,
    ) -> list[dict[str, Tensor]]:
        """Add masks to detections.

        Args:
            results: Detections of `PostProcess`.
            outputs: `pred_masks` `(B, Q, h, w)`, logits for the padded images.
            original_sizes: Height and width `(B, 2)` of the original images.
            sizes: Height and width `(B, 2)` of the model's images without padding.

        Returns:
            The detections with `masks` `(Q, H, W)` bool, at the size of the original image.

        Raises:
            ValueError: The shape of `original_sizes` or `sizes` is wrong.
        """
        logits = outputs["pred_masks"]
        _check_sizes(original_sizes, len(logits), "original_sizes")
        _check_sizes(sizes, len(logits), "sizes")
        padded = sizes.amax(0).tolist()
        rows = zip(results, logits, sizes.tolist(), original_sizes.tolist(), strict=True)
        return [
            result | {"masks": self._full_size(masks, padded, size, original)}
            for result, masks, size, original in rows
        ]

    def _full_size(
        self, logits_QHW: Tensor, padded: list[int], size: list[int], original: list[int]
    ) -> Tensor:
        """Resize the mask logits of an image to the original size, without padding."""
        height, width = size
        # A threshold for logits avoids the memory of a sigmoid of every pixel.
        threshold = math.log(self.threshold / (1 - self.threshold))
        chunks = []
        for chunk in logits_QHW.float().split(_QUERIES_AT_ONCE):
            resized = F.interpolate(chunk[:, None], padded, mode="bilinear") > threshold
            cropped = resized[..., :height, :width].to(torch.uint8)
            chunks.append(F.interpolate(cropped, original, mode="nearest")[:, 0].bool())
        return torch.cat(chunks)


def _check_sizes(sizes: Tensor, images: int, name: str) -> None:
    """Raise ValueError if there is not a height and a width for every image."""
    if sizes.shape != (images, 2):
        raise ValueError(
            f"{name} must have the shape ({images}, 2), height and width of every image, "
            f"got {tuple(sizes.shape)}"
        )
