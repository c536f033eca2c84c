"""Top-1 accuracy, top-5 accuracy and loss over a validation set.

The metrics are bitwise equal for any number of processes: the processes evaluate whole batches
round-robin, and the sums of the batches are added up in the order of the data.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from classification.report import ClassReport
from datasets import normalize_pixels
from engine import all_gather_object, autocast, copy_to

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(
    models: dict[str, nn.Module],
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    shared: bool = True,
    report: ClassReport | None = None,
) -> dict[str, float]:
    """Evaluate classifiers in one pass over the data.

    Args:
        models: Prefix of the names of the metrics → model that returns logits `(B, C)`. The mode
            of each model is restored.
        loader: Batches `(images (B, 3, H, W), targets (B,))` of this process, which are batches
            `rank`, `rank + world size`, … of the data. The images are uint8, or normalized.
        device: Device of the models.
        dtype: Data type of automatic mixed precision; float32 disables it.
        shared: Whether the data is divided among the processes; else each process has all of it.
        report: Collects the details of this evaluation.

    Returns:
        For every model `acc1` and `acc5` in percent, and the mean cross-entropy `loss`.
    """
    were_training = {prefix: model.training for prefix, model in models.items()}
    for model in models.values():
        model.eval()
    sums: dict[str, list[Tensor]] = {prefix: [] for prefix in models}
    if report is not None:
        report.reset()
    for number, batch in enumerate(loader):
        pixels, targets = copy_to(batch, device)
        images = normalize_pixels(pixels)
        for prefix, model in models.items():
            with autocast(device, dtype):
                logits = model(images).float()
            top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            sums[prefix].append(_batch_sums(logits, top, targets))
            if report is not None:
                report.add(prefix, number, pixels, logits, torch.stack([targets, top[:, 0]]))
    if report is not None:
        report.gather(shared=shared)
    metrics = {}
    for prefix, model in models.items():
        model.train(were_training[prefix])
        for name, value in _means(sums[prefix], shared).items():
            metrics[f"{prefix}{name}"] = value
    return metrics


def _batch_sums(logits: Tensor, top: Tensor, targets: Tensor) -> Tensor:
    """Return the sums of a batch, `(4,)` float64: top-1 hits, top-5 hits, losses and images."""
    correct = top == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    count = logits.new_tensor(len(targets))
    sums = (correct[:, 0].sum(), correct.sum(), loss, count)
    return torch.stack([value.double() for value in sums])


def _means(sums: list[Tensor], shared: bool) -> dict[str, float]:
    """Return the metrics of one model from the sums of its batches."""
    local = torch.stack(sums).cpu() if sums else torch.zeros(0, 4, dtype=torch.float64)
    per_process = all_gather_object(local) if shared else [local]
    correct1, correct5, loss, count = _in_data_order(per_process).sum(0)
    return {
        "acc1": (100 * correct1 / count).item(),
        "acc5": (100 * correct5 / count).item(),
        "loss": (loss / count).item(),
    }


def _in_data_order(per_process: list[Tensor]) -> Tensor:
    """Return the sums of all batches, `(batches, 4)`; batch b is from process `b % world size`."""
    world_size = len(per_process)
    total = sum(len(sums) for sums in per_process)
    return torch.stack([per_process[b % world_size][b // world_size] for b in range(total)])
