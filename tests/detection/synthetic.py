"""Recorded and random outputs and targets for the tests of losses and evaluation."""

import torch
from torch import Tensor

from tests.recipes import golden


def recorded(name: str) -> Tensor:
    """Return an array of the golden file `matching`."""
    return torch.from_numpy(golden("matching")[name])


def recorded_targets(prefix: str, images: int) -> list[dict[str, Tensor]]:
    """Return labels and boxes of the golden file `matching`."""
    return [{n: recorded(f"{prefix}/t{i}/{n}") for n in ("labels", "boxes")} for i in range(images)]


def boxes(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return random boxes inside the image, `(count, 4)`, as normalized (cx, cy, w, h)."""
    sizes = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
    centers = sizes / 2 + (1 - sizes) * torch.rand(count, 2, generator=generator)
    return torch.cat([centers, sizes], dim=1)


def targets(*counts: int, classes: int = 5) -> list[dict[str, Tensor]]:
    """Return random targets with the given number of objects for each image."""
    return [{"labels": torch.randint(classes, (n,)), "boxes": boxes(n)} for n in counts]


def outputs(images: int, queries: int = 7, classes: int = 5, layers: int = 0) -> dict:
    """Return random outputs that require gradients, with a number of auxiliary layers."""
    made = {
        "pred_logits": torch.randn(images, queries, classes + 1, requires_grad=True),
        "pred_boxes": boxes(images * queries).view(images, queries, 4).requires_grad_(),
    }
    if layers:
        made["aux_outputs"] = [outputs(images, queries, classes) for _ in range(layers)]
    return made
