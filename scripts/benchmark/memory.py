r"""Compute what the training of a recipe keeps in memory, without a GPU.

    python -m scripts.benchmark memory classification \
        --config configs/classification/one_gpu_8gb.yaml
    python -m scripts.benchmark memory detection --config configs/detection/one_gpu_8gb.yaml

The options after the task are those of its trainer. The command runs the forward pass on the CPU
with one and with two images, and counts the bytes that autograd stores for the backward pass. Two
images give the bytes of each further image. bfloat16 stands for float16, which has the same size.

The result is a lower bound of the memory of a GPU, not a measurement. It leaves out temporary
tensors of the backward pass (with checkpointing, the activations of one layer), fragmentation, the
work space of cuDNN, CUDA itself and the losses. Operators of a GPU may store slightly different
tensors than those of the CPU.
"""

import argparse
import importlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from engine import Config
from engine.optim import autocast

__all__ = ["main", "parse_args"]

CPU = torch.device("cpu")
# The classes of ImageNet-1k.
CLASSES = 1000
GIB = 2**30


def parse_args(argv: Sequence[str] | None = None) -> tuple[str, Config]:
    """Read the command line; return the task and the configuration of its trainer."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=("classification", "detection"), help="Trainer")
    args, flags = parser.parse_known_args(argv)
    return args.task, importlib.import_module(f"{args.task}.config").parse_args(flags)


def build_classifier(config: Config) -> tuple[nn.Module, torch.optim.Optimizer, tuple[int, int]]:
    """Return a classifier with random weights, its optimizer and the size of its images."""
    from classification.build import create_model, create_optimizer

    config = config.model_copy(update={"finetune": "", "pretrained": False})
    model = create_model(config, CLASSES)
    return model, create_optimizer(config, model, 512), config.image_size


def build_detector(config: Config) -> tuple[nn.Module, torch.optim.Optimizer, tuple[int, int]]:
    """Return a detector with random weights, its optimizer and the size of its largest images."""
    from detection.build import build_model, create_optimizer

    model, _, _ = build_model(config, load=False)
    model.set_grad_checkpointing(config.grad_checkpointing)
    short = config.image_size or 800
    return model, create_optimizer(config, model), (short, round(short * 1333 / 800))


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, ema: bool) -> int:
    """Return the bytes of weights, gradients, states of the optimizer and EMA."""
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    gradients = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            gradients += parameter.nbytes
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values()]
    tensors = sum(x.nbytes for x in states if isinstance(x, torch.Tensor))
    return weights * (2 if ema else 1) + gradients + tensors


def stored_bytes(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> int:
    """Return the bytes that a forward pass stores for the backward pass, without the weights."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The outputs keep the stored tensors alive, so that no two of them have the same pointer.
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, dtype):
        outputs = model(images)
    total = sum(sizes.values())
    del outputs
    return total


def main(argv: Sequence[str] | None = None) -> None:
    """Print the memory of the recipe."""
    task, config = parse_args(argv)
    build = build_classifier if task == "classification" else build_detector
    model, optimizer, (height, width) = build(config)
    is_float32 = config.dtype == "float32" or (config.dtype == "auto" and task == "detection")
    dtype = torch.float32 if is_float32 else torch.bfloat16
    model.train()
    one, two = (stored_bytes(model, torch.zeros(n, 3, height, width), dtype) for n in (1, 2))
    states = state_bytes(model, optimizer, config.model_ema)
    stored = one + (config.batch_size - 1) * (two - one)
    names = "weights, gradients, optimizer" + (", EMA" if config.model_ema else "")
    print(f"{names:<36} {states / GIB:6.2f} GiB")
    print(
        f"{'stored for the backward pass':<36} {stored / GIB:6.2f} GiB  (batch of "
        f"{config.batch_size} images of {height} x {width}, {(two - one) / 2**20:.1f} MiB each)"
    )
    print(f"{'lower bound':<36} {(states + stored) / GIB:6.2f} GiB")
