"""A trainer in miniature: the smallest `main()` that uses all of engine, for the tests to break.

Runs by itself too: `python -m tests.engine.toy --output-dir OUT --epochs 2`.
"""

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader, Dataset

import engine
from engine import cli
from engine.distributed import is_main


class DataOptions(engine.Config):
    """Data."""

    samples: int = Field(44, gt=0)
    """Number of samples."""
    batch_size: int = Field(4, gt=0)
    """Samples per batch and process."""
    num_workers: int = Field(0, ge=0)
    """Processes that load samples."""


class ToyConfig(DataOptions):
    """Run."""

    output_dir: str = ""
    """Where files go."""
    epochs: int = Field(2, gt=0)
    """Number of epochs."""
    lr: float = Field(0.05, gt=0)
    """Learning rate."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision."""
    accumulate: int = Field(1, gt=0)
    """Batches per optimizer step."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradients."""
    seed: int = 0
    """Seed of everything."""
    checkpoint_steps: int = Field(0, ge=0)
    """Steps between checkpoints."""
    kill_at: tuple[int, int, int] | None = None
    """Signal, epoch and step at which the run sends it to itself."""
    poison_at: int | None = None
    """Position of a sample that is not a number."""
    pause: float = Field(0, ge=0)
    """Seconds that a step takes longer."""
    device: str = "cpu"
    """Device."""


class Positions:
    """A sampler: (index, seed) of every sample of this process, from a position on."""

    def __init__(self, world: engine.World, config: ToyConfig) -> None:
        self.world, self.config = world, config
        self.length = config.samples // world.world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(
            self.config.samples, generator=torch.Generator().manual_seed(self.epoch)
        )
        mine = order[self.world.rank :: self.world.world_size][: self.length].tolist()
        for position in range(self.start, self.length):
            place = position * self.world.world_size + self.world.rank
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


def train(config: ToyConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains, and returns the state that a checkpoint would hold."""
    world = engine.init_distributed(config.device)
    output_dir = engine.check_writable(config.output_dir) if config.output_dir else None
    engine.setup_logging(output_dir, world.rank)

    sampler = Positions(world, config)
    loader = DataLoader(
        Noise(config),
        batch_size=config.batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=config.num_workers,
        worker_init_fn=engine.shield_worker,
    )
    model = build_model(config.seed)
    ema = deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    dtype = engine.DTYPES[config.dtype]
    scaler = engine.make_scaler(world.device, dtype)
    state = engine.TrainState(model, optimizer, scaler)
    options = engine.LoopOptions(
        device=world.device,
        steps=len(loader) // config.accumulate,
        batch_size=config.batch_size,
        seed=config.seed,
        dtype=dtype,
        accumulate=config.accumulate,
        clip_grad=config.clip_grad,
        print_freq=3,
        checkpoint_steps=config.checkpoint_steps,
        output_dir=output_dir,
    )
    checkpoints = engine.CheckpointDir(output_dir, keep=1) if output_dir else None
    if resume:
        checkpoint = torch.load(checkpoints.latest(), weights_only=True)
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["model_ema"])
        schedule.load_state_dict(checkpoint["lr_scheduler"])
        state.load_state_dict(checkpoint)
    state.model = engine.distribute(model, world)

    def step_fn(batch: Any) -> dict[str, torch.Tensor]:
        images, labels = batch
        time.sleep(config.pause)
        # A draw from each generator, as augmentation in the step makes it; in place, as mixup does.
        images.mul_(1 + 0.1 * random.random()).add_(0.1 * float(np.random.rand()))
        logits = state.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    def on_step() -> None:
        schedule.step()
        with torch.no_grad():
            for mean, value in zip(ema.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 0.1)
        if config.kill_at and config.kill_at[1:] == (state.epoch, state.step):
            os.kill(os.getpid(), config.kill_at[0])

    def content() -> dict[str, Any]:
        return state.state_dict() | {
            "model_ema": ema.state_dict(),
            "lr_scheduler": schedule.state_dict(),
            "args": engine.dump(config),
        }

    def save(epoch: int | None = None) -> None:
        if checkpoints and is_main():
            checkpoints.save(content(), epoch=epoch)

    done = state.epoch * options.steps + state.step
    with engine.RunLog(output_dir, start_step=done) as log, engine.StopRequest() as stop:
        while state.epoch < config.epochs:
            sampler.epoch = state.epoch
            sampler.start = state.step * config.accumulate * config.batch_size
            figures = engine.train_epoch(
                step_fn, loader, state, options, stop=stop, log=log, on_step=on_step, save=save
            )
            epoch = state.epoch
            state.finish_epoch()
            save(epoch)
            line = {f"train_{name}": value for name, value in figures.items()}
            log.write_epoch(line | {"epoch": epoch}, state.epoch * options.steps)
    return content()


def main(argv: Sequence[str] | None = None) -> None:
    """Trains once, with flags."""
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
