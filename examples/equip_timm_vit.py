"""Give iRPE to a trained vision transformer of timm and fine-tune it, in a minute on a CPU.

A small ViT learns scikit-learn's handwritten digits. Then `add_irpe` adds tables of zeros, which
change nothing yet, and both it and a copy without iRPE are trained further for as long.

    python -m examples.equip_timm_vit [--rpe SPEC] [--epochs N]
"""

import argparse
import copy

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.embedded import split_digits
from irpe_core import add_irpe, parse_rpe_spec


def load(split: str) -> tuple[Tensor, Tensor]:
    """Digits as images (N, 1, 8, 8) in -1..1, and their labels."""
    _, labels, inks = zip(*split_digits()[split], strict=True)
    images = torch.stack([torch.from_numpy(ink) for ink in inks])[:, None]
    return images / 127.5 - 1, torch.tensor(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    """AdamW over random batches of 64, with a cosine from `lr` to zero."""
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
    parser = argparse.ArgumentParser(description="Give iRPE to a trained ViT and fine-tune it.")
    parser.add_argument("--rpe", default="rpe-1.9-product-ctx-1-qkv")
    parser.add_argument("--epochs", type=int, default=15, help="without iRPE, and again after it")
    args = parser.parse_args(argv)
    try:
        parse_rpe_spec(args.rpe)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    # The tensors are small: more threads would only wait for each other.
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
