"""The sizes of objects in COCO's three classes, and in a finer histogram."""

import itertools

import numpy as np

__all__ = ["BINS", "coco_sizes", "histogram"]

# Edges of the histogram: side of a square with the object's area, in pixels.
_EDGES = (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
BINS = [*(f"{low}-{high}" for low, high in itertools.pairwise(_EDGES)), "512+"]


def coco_sizes(areas: np.ndarray) -> dict[str, int]:
    """Return the number of small, medium and large objects as in COCO's metrics.

    Args:
        areas: Areas in square pixels, (M,).
    """
    small, large = areas < 32**2, areas > 96**2
    return {
        "small": int(small.sum()),
        "medium": int((~small & ~large).sum()),
        "large": int(large.sum()),
    }


def histogram(areas: np.ndarray) -> list[int]:
    """Return the number of objects in each of `BINS`.

    Args:
        areas: Areas in square pixels, (M,).
    """
    sides = np.sqrt(np.maximum(areas, 0))
    return np.histogram(sides, bins=[*_EDGES, np.inf])[0].tolist()
