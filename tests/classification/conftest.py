"""Fixtures: a small run on the built-in digits, and a check of failing commands."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from classification.main import main
from datasets.embedded import write_digits
from tests.commands import failure_of

_TINY = (
    "--model deit_tiny_patch16_224 --rpe rpe-1.9-product-ctx-1-qkv --input_size 16 --patch_size 4 "
    "--embed_dim 32 --depth 2 --num_heads 2 --mlp_ratio 2 --data_set DIGITS --batch_size 64 "
    "--num_workers 0 --lr 2e-3 --no-scale_lr --warmup_epochs 0 --model_ema_decay 0.9 --device cpu"
)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built-in digits."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def flags(digits: Path) -> list[str]:
    """Return the flags of a small model that is trained with the recipe of DeiT."""
    return [*_TINY.split(), "--data_path", str(digits)]


@pytest.fixture(scope="session")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of an uninterrupted run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    main([*flags, "--epochs", "2", "--output_dir", str(folder)])
    return folder


@pytest.fixture
def failure(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Return a function that runs the command and returns its exit code and error line."""
    return lambda *argv: failure_of(main, argv, capsys)


def weights(folder: Path, name: str = "checkpoint.pth") -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint and those of its EMA, with the prefix `ema.`."""
    content = torch.load(folder / name, weights_only=True)
    ema = {f"ema.{key}": value for key, value in content["model_ema"].items()}
    return content["model"] | ema
