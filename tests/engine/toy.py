"""A third trainer in miniature, for the tests to interrupt: all of engine on random data.

It also runs by itself: `python -m tests.engine.toy --output-dir OUT --epochs 2`.
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
from torch import nn
from torch.utils.data import DataLoader, Dataset

import engine
from engine import cli


class ToyConfig(engine.RunConfig):
    """Toy."""

    samples: int = Field(44, gt=0)
    """Number of samples."""
    batch_size: int = Field(4, gt=0)
    """Samples per batch and process."""
    num_workers: int = Field(0, ge=0)
    """Number of data loading processes."""
    epochs: int = Field(2, gt=0)
    """Number of epochs."""
    lr: float = Field(0.05, gt=0)
    """Learning rate."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradients."""
    kill_at: tuple[int, int, int] | None = None
    """Signal, epoch and step: the run sends itself the signal during that step."""
    poison_at: int | None = None
    """Index of a sample that is not finite."""
    pause: float = Field(0, ge=0)
    """Seconds to wait in every step."""
    device: str = "cpu"
    """Device."""
    print_freq: int = 3
    """Steps between two lines of output."""


class Positions:
    """A sampler of (index, seed) for every sample of this process, from a position on."""

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        self.length = config.samples // engine.world_size()
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(
            self.config.samples, generator=torch.Generator().manual_seed(self.epoch)
        )
        mine = order[engine.rank() :: engine.world_size()][: self.length].tolist()
        for position in range(self.start, self.length):
            place = position * engine.world_size() + engine.rank()
            yield mine[position], engine.derive_seed(self.config.seed, self.epoch, place)


class Noise(Dataset):
    """Samples whose every number comes from their own seed."""

    def __init__(self, config: ToyConfig) -> None:
        self.config = config

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, seed = item
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(7, generator=generator) + index % 3
        if index == self.config.poison_at:
            image[3] = torch.nan
        return image, torch.tensor(index % 3)


def build_model(seed: int) -> nn.Module:
    """Dropout draws random numbers in every step, batch norm keeps buffers."""
    engine.seed_all(seed)
    return nn.Sequential(
        nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3)
    )


def create_step(config: ToyConfig, positions: Positions) -> Callable[..., dict[str, torch.Tensor]]:
    """Return the training step, which may also send the process a signal."""
    calls = {"epoch": -1, "count": 0}

    def kill_if_due() -> None:
        if calls["epoch"] != positions.epoch:
            calls.update(epoch=positions.epoch, count=positions.start // config.batch_size)
        calls["count"] += 1
        step, rest = divmod(calls["count"], config.accumulate_steps)
        if config.kill_at and rest == 0 and config.kill_at[1:] == (positions.epoch, step):
            os.kill(os.getpid(), config.kill_at[0])

    def step(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        kill_if_due()
        images, labels = batch
        time.sleep(config.pause)
        # A draw from each generator, as augmentation in the step makes it; in place, as mixup does.
        images.mul_(1 + 0.1 * random.random()).add_(0.1 * float(np.random.rand()))
        logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    return step


def evaluate(models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Return a number that all processes share; their running means of batch norm differ."""
    return {f"{prefix}mean": model[-1].weight.mean().item() for prefix, model in models.items()}


def train(config: ToyConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train, and return the content of the last checkpoint."""
    config = config.model_copy(update={"auto_resume": resume})
    session = engine.start_session(config, lambda path: torch.load(path, weights_only=True))
    positions = Positions(config)
    loader = DataLoader(
        Noise(config),
        batch_size=config.batch_size,
        sampler=positions,
        drop_last=True,
        num_workers=config.num_workers,
        worker_init_fn=engine.shield_worker,
    )
    model = build_model(config.seed)
    ema = ModelEmaV3(model, decay=0.9, exclude_buffers=True)
    if session.checkpoint is not None:
        model.load_state_dict(session.checkpoint["model"])
        ema.module.load_state_dict(session.checkpoint["model_ema"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    recipe = engine.Recipe(
        model=model,
        ema=ema,
        batches=loader,
        step=create_step(config, positions),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        schedule_per_step=True,
        dtype=engine.resolve_dtype(config.dtype, auto=torch.float32),
        clip_grad=config.clip_grad,
        evaluate=evaluate,
        best_by="mean",
    )
    return engine.run_training(session, recipe)


def main(argv: Sequence[str] | None = None) -> None:
    """Train once, with flags."""
    config = engine.parse_config(ToyConfig, argv, prog="toy", description="A toy.")
    last = Path(config.output_dir) / "checkpoint.pth"
    train(config, resume=bool(config.output_dir) and last.exists())


def equal(left: Any, right: Any) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


SIGTERM, SIGKILL = int(signal.SIGTERM), int(signal.SIGKILL)

if __name__ == "__main__":
    cli.run(main)
