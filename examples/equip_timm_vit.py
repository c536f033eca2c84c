"""Add iRPE to a trained vision transformer of timm and fine-tune it, in a minute on a CPU.

    python -m examples.equip_timm_vit [--rpe SPEC] [--epochs N]

A small ViT is trained on scikit-learn's handwritten digits. `add_irpe` then adds tables of zeros,
which do not change its outputs. The model and a copy without iRPE are trained further for the same
number of epochs.
"""

import argparse
import copy

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.embedded import split_digits
from irpe_core import add_irpe, parse_rpe_spec

__all__ = ["main"]


def load(split: str) -> tuple[Tensor, Tensor]:
    """Return digits as images (B, 1, 8, 8) in [-1, 1], and their labels (B,)."""
    _, labels, inks = zip(*split_digits()[split], strict=True)
    images = torch.stack([torch.from_numpy(ink) for ink in inks])[:, None]
    return images / 127.5 - 1, torch.tensor(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    """Train with AdamW on random batches of 64 and a cosine schedule from `lr` to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def main(argv: list[str] | None = None) -> None:
    """Train, add iRPE, train further, and print the accuracy after each step."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.equip_timm_vit",
        description="Add iRPE to a trained ViT and fine-tune it.",
    )
    parser.add_argument(
        "--rpe",
        default="rpe-1.9-product-ctx-1-qkv",
        help="iRPE to add, see docs/equip.md (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=15,
        help="Number of epochs before iRPE is added, and again afterwards (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    try:
        parse_rpe_spec(args.rpe)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    # With tensors this small, more threads make training slower.
    torch.set_num_threads(1)
    training, (images, labels) = load("train"), load("val")

    @torch.no_grad()
    def report(title: str, model: nn.Module) -> None:
        correct = (model.eval()(images).argmax(1) == labels).double()
        print(f"{title:<30} {correct.mean():.1%} of {len(labels)} validation images", flush=True)

    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **sizes)
    train(model, *training, args.epochs, lr=2e-3)
    report("trained without iRPE:", model)
    plain = copy.deepcopy(model)
    add_irpe(model, args.rpe)
    report("iRPE added, not yet trained:", model)
    train(model, *training, args.epochs, lr=1e-3)
    report("trained further with iRPE:", model)
    train(plain, *training, args.epochs, lr=1e-3)
    report("trained further without it:", plain)


if __name__ == "__main__":
    main()
