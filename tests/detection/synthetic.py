"""Recorded and invented outputs and targets for the tests of losses and evaluation."""

import torch
from torch import Tensor

from tests.recipes import golden


def recorded(name: str) -> Tensor:
    """An array of the golden matching file."""
    return torch.from_numpy(golden("matching")[name])


def recorded_targets(prefix: str, images: int) -> list[dict[str, Tensor]]:
    """Labels and boxes of the golden matching file."""
    return [{n: recorded(f"{prefix}/t{i}/{n}") for n in ("labels", "boxes")} for i in range(images)]


def boxes(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Normalized (cx, cy, w, h), `(count, 4)`, inside the image."""
    sizes = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
    centers = sizes / 2 + (1 - sizes) * torch.rand(count, 2, generator=generator)
    return torch.cat([centers, sizes], dim=1)


def targets(*counts: int, classes: int = 5) -> list[dict[str, Tensor]]:
    """Random objects, so many for each image."""
    return [{"labels": torch.randint(classes, (n,)), "boxes": boxes(n)} for n in counts]


def outputs(images: int, queries: int = 7, classes: int = 5, layers: int = 0) -> dict:
    """Random outputs, with as many auxiliary layers, that want a gradient."""
    made = {
        "pred_logits": torch.randn(images, queries, classes + 1, requires_grad=True),
        "pred_boxes": boxes(images * queries).view(images, queries, 4).requires_grad_(),
    }
    if layers:
        made["aux_outputs"] = [outputs(images, queries, classes) for _ in range(layers)]
    return made
