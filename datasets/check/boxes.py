"""Boxes that training clips or leaves out."""

import numpy as np

from datasets.check.annotations import Examined
from datasets.check.findings import Finding

__all__ = ["find_bad_boxes"]

# Below this fraction of the objects, a bad box is a note. COCO itself has a few.
_RARE = 0.001
# Boxes are often rounded outwards, so a pixel beyond the border is accepted.
_TOLERANCE = 1.0


def find_bad_boxes(examined: Examined, sizes: np.ndarray, split: str) -> list[Finding]:
    """Return the findings of empty boxes, boxes outside the image and normalized boxes.

    Args:
        examined: The annotations.
        sizes: Widths and heights of the images in training, (N, 2); 0 where unknown.
        split: Name of the split.
    """
    boxes = examined.boxes
    if not len(boxes):
        return []
    corner = boxes[:, :2] + boxes[:, 2:]
    limits = sizes[examined.rows]
    known = (limits > 0).all(axis=1)
    empty = (boxes[:, 2:] <= 0).any(axis=1)
    beyond = ((boxes[:, :2] < -_TOLERANCE) | (corner > limits + _TOLERANCE)).any(axis=1)
    gone = ((corner <= 0) | (boxes[:, :2] >= limits)).any(axis=1) & known & ~empty
    outside = beyond & known & ~empty | gone
    findings = []
    if np.count_nonzero(empty):
        meaning = "Width and height must be > 0; training leaves these objects out."
        findings.append(_box_finding("empty boxes", empty, examined, meaning, split))
    if np.count_nonzero(outside):
        meaning = "Training clips them to the image."
        if lost := np.count_nonzero(gone):
            meaning = (
                f"Training clips them to the image, and leaves out {lost} without a pixel in it."
            )
        findings.append(_box_finding("boxes outside the image", outside, examined, meaning, split))
    if (boxes <= 1).all() and np.count_nonzero(~empty):
        meaning = "Coordinates must be in pixels; all of them are at most 1."
        findings.append(Finding("warning", "normalized boxes", split, len(boxes), meaning))
    return findings


def _box_finding(
    kind: str, chosen: np.ndarray, examined: Examined, meaning: str, split: str
) -> Finding:
    """Return the finding of the chosen boxes."""
    positions = chosen.nonzero()[0]
    examples = [
        f"{examined.file_names[examined.rows[i]]}: {examined.boxes[i].round(2).tolist()}"
        for i in positions[:20].tolist()
    ]
    level = "note" if len(positions) < _RARE * len(chosen) else "warning"
    return Finding(level, kind, split, len(positions), meaning, examples)
