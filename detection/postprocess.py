"""From outputs of the model to detections in the coordinates of the original image.

Every query gives one detection, of its most probable class other than no-object; nothing is
suppressed (Carion et al., ECCV 2020).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.boxes import cxcywh_to_xyxy

__all__ = ["PostProcess", "PostProcessSegm"]

# Masks at full size take 4 bytes per pixel and query: so many queries at a time.
_MASKS_AT_ONCE = 32


class PostProcess(nn.Module):
    """Scores, labels and absolute boxes of every query."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """Turn outputs into detections.

        Args:
            outputs: `pred_logits` `(B, Q, C+1)` and `pred_boxes` `(B, Q, 4)`.
            sizes: `(B, 2)`, height and width that the boxes refer to, in pixels: those of the
                original image for evaluation.

        Returns:
            For every image `scores` `(Q,)`, `labels` `(Q,)` and `boxes` `(Q, 4)` as
            (x1, y1, x2, y2) in pixels.

        Raises:
            ValueError: The shape of `sizes` does not fit.
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
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold} but should be in (0, 1)")
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
            results: Of `PostProcess`.
            outputs: `pred_masks` `(B, Q, h, w)`, logits, of images padded to the largest of them.
            original_sizes: `(B, 2)`, height and width of the original images.
            sizes: `(B, 2)`, height and width of the images as the model saw them, unpadded.

        Returns:
            The results with `masks` `(Q, H, W)` bool, at the size of the original image.

        Raises:
            ValueError: The shape of `original_sizes` or `sizes` does not fit.
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
        height, width = size
        # The threshold on the logit; the sigmoid of every pixel would only cost memory.
        threshold = math.log(self.threshold / (1 - self.threshold))
        chunks = []
        for chunk in logits_QHW.float().split(_MASKS_AT_ONCE):
            resized = F.interpolate(chunk[:, None], padded, mode="bilinear") > threshold
            cropped = resized[..., :height, :width].to(torch.uint8)
            chunks.append(F.interpolate(cropped, original, mode="nearest")[:, 0].bool())
        return torch.cat(chunks)


def _check_sizes(sizes: Tensor, images: int, name: str) -> None:
    if sizes.shape != (images, 2):
        raise ValueError(
            f"{name} has the shape {tuple(sizes.shape)} but should be ({images}, 2): "
            "height and width of every image"
        )
