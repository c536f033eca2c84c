"""A small trainer on `engine.Recipe`, which the tests interrupt and resume.

It trains a classifier of random vectors with all features of `engine`. Samples, dropout and the
step draw random numbers, batch norm has buffers, and there are an EMA and a schedule, so an error
in resuming changes the weights. As a command: `python -m tests.engine.toy --output-dir OUT`.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import engine
from engine import cli

SIGTERM, SIGKILL = int(signal.SIGTERM), int(signal.SIGKILL)


class ToyConfig(engine.RunConfig):
    """Toy."""

    samples: int = Field(44, gt=0)
    """Number of samples."""
    batch_size: int = Field(4, gt=0)
    """Input batch size per process."""
    num_workers: int = Field(0, ge=0)
    """Number of data loading processes."""
    epochs: int = Field(2, gt=0)
    """Number of epochs to train."""
    lr: float = Field(0.05, gt=0)
    """Learning rate."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradients."""
    ema_warmup: bool = False
    """Start the EMA with a small decay."""
    device: str = "cpu"
    """Device to run on."""
    print_freq: int = 3
    """Number of optimizer steps between printed metrics."""
    kill_at: tuple[int, int, int] | None = None
    """Signal, epoch and step: the process sends itself the signal during that step."""
    nan_at: int | None = None
    """Index of a sample that contains NaN."""
    kill_worker_at: int | None = None
    """Index of a sample: the worker that loads it ends."""
    pause: float = Field(0, ge=0)
    """Seconds to wait before each forward pass."""


class ToySampler:
    """A sampler of (index, seed) pairs for the samples of this process."""

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        self.length = config.samples // engine.world_size()
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch and its first sample."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(self.config.samples, generator=generator).tolist()
        for number in range(self.start, self.length):
            position = number * engine.world_size() + engine.rank()
            yield order[position], engine.derive_seed(self.config.seed, self.epoch, position)


class ToyDataset(Dataset):
    """Random vectors around one of three class means, drawn from the seed of the sample."""

    def __init__(self, config: ToyConfig) -> None:
        self.config = config

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, seed = item
        label = index % 3
        vector = torch.randn(7, generator=torch.Generator().manual_seed(seed)) + label
        if index == self.config.kill_worker_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.config.nan_at:
            vector[3] = torch.nan
        return vector, torch.tensor(label)


class Killer:
    """The signal that this process sends itself during a step, as `kill_at` says."""

    def __init__(self, config: ToyConfig, sampler: ToySampler) -> None:
        self.config, self.sampler = config, sampler
        self.epoch, self.batches = -1, 0

    def count_batch(self) -> None:
        """Count a batch, and send the signal if it is the last one of the step."""
        if self.epoch != self.sampler.epoch:
            self.epoch = self.sampler.epoch
            self.batches = self.sampler.start // self.config.batch_size
        self.batches += 1
        step, rest = divmod(self.batches, self.config.accumulate_steps)
        if self.config.kill_at and rest == 0 and self.config.kill_at[1:] == (self.epoch, step):
            os.kill(os.getpid(), self.config.kill_at[0])


def create_model(seed: int) -> nn.Module:
    """Create a model with dropout and batch norm."""
    engine.seed_all(seed)
    return nn.Sequential(
        nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3)
    )


def create_step(config: ToyConfig, killer: Killer) -> Callable[..., dict[str, Tensor]]:
    """Return the function for one training step."""

    def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        killer.count_batch()
        time.sleep(config.pause)
        vectors, labels = batch
        # Augment in place with random numbers of Python and NumPy, as mixup does.
        vectors.mul_(1 + 0.1 * random.random()).add_(0.1 * float(np.random.rand()))
        logits = model(vectors)
        loss = F.cross_entropy(logits.float(), labels)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    return step


def evaluate(models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Return the mean of some weights, which is the same in all processes."""
    return {f"{prefix}mean": model[-1].weight.mean().item() for prefix, model in models.items()}


def sanity(models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Draw random numbers, as an evaluation for `--val_sanity` may do."""
    torch.rand(3), random.random(), np.random.rand(3)
    return {}


def train(config: ToyConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train, and return the content of the last checkpoint."""
    config = config.model_copy(update={"auto_resume": resume})
    session = engine.start_session(config, lambda path: torch.load(path, weights_only=True))
    sampler = ToySampler(config)
    loader = DataLoader(
        ToyDataset(config),
        batch_size=config.batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=config.num_workers,
        worker_init_fn=engine.shield_worker,
    )
    model = create_model(config.seed)
    ema = ModelEmaV3(model, decay=0.9, use_warmup=config.ema_warmup, exclude_buffers=True)
    if session.checkpoint is not None:
        model.load_state_dict(session.checkpoint["model"])
        ema.module.load_state_dict(session.checkpoint["model_ema"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    recipe = engine.Recipe(
        model=model,
        ema=ema,
        batches=loader,
        step=create_step(config, Killer(config, sampler)),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        schedule_per_step=True,
        dtype=engine.resolve_dtype(config.dtype, auto=torch.float32),
        clip_grad=config.clip_grad,
        evaluate=evaluate,
        best_by="mean",
        sanity=sanity,
    )
    return engine.run_training(session, recipe)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as a command; resume if the output folder has a checkpoint."""
    config = engine.parse_config(ToyConfig, argv, prog="toy", description="A toy.")
    last = Path(config.output_dir) / "checkpoint.pth"
    train(config, resume=bool(config.output_dir) and last.exists())


def equal(left: Any, right: Any) -> bool:
    """Return whether two nested states are equal in every bit."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


if __name__ == "__main__":
    cli.run(main)
