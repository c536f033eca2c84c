"""Top-1, top-5 and loss over a validation set, exact for any number of processes.

Whole batches are dealt out to the processes and their sums added up in the order of the data, so
that every number is the same, to the last digit, however many processes take part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
) -> dict[str, float]:
    """Evaluate classifiers, all in one pass over the data.

    Args:
        models: What to put before the names of the figures → a model that gives logits `(B, C)`;
            left in the mode it was in.
        loader: Batches `(images (B, 3, H, W), targets (B,))` of this process, which hold batch
            `rank`, `rank + world size`, … of the data.
        device: Where the models are.
        dtype: Of autocast; float32 for none.
        shared: Whether the processes share the data, or each has all of it.

    Returns:
        For every model `acc1` and `acc5` in percent, `loss` the mean cross-entropy.
    """
    were_training = {prefix: model.training for prefix, model in models.items()}
    for model in models.values():
        model.eval()
    sums: dict[str, list[Tensor]] = {prefix: [] for prefix in models}
    for batch in loader:
        images, targets = copy_to(batch, device)
        for prefix, model in models.items():
            with autocast(device, dtype):
                logits = model(images)
            sums[prefix].append(_batch_sums(logits.float(), targets))
    figures = {}
    for prefix, model in models.items():
        model.train(were_training[prefix])
        for name, value in _means(sums[prefix], shared).items():
            figures[f"{prefix}{name}"] = value
    return figures


def _means(sums: list[Tensor], shared: bool) -> dict[str, float]:
    local = torch.stack(sums).cpu() if sums else torch.zeros(0, 4, dtype=torch.float64)
    per_process = all_gather_object(local) if shared else [local]
    correct1, correct5, loss, count = _in_data_order(per_process).sum(0)
    return {
        "acc1": (100 * correct1 / count).item(),
        "acc5": (100 * correct5 / count).item(),
        "loss": (loss / count).item(),
    }


def _batch_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """`(4,)` float64: correct in one guess, correct in five, summed loss, number of images."""
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    correct = top == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    count = logits.new_tensor(len(targets))
    sums = (correct[:, 0].sum(), correct.sum(), loss, count)
    return torch.stack([value.double() for value in sums])


def _in_data_order(per_process: list[Tensor]) -> Tensor:
    """`(batches, 4)`: batch b was computed by process `b % world size`."""
    world_size = len(per_process)
    total = sum(len(sums) for sums in per_process)
    return torch.stack([per_process[b % world_size][b // world_size] for b in range(total)])
