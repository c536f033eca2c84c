"""A small run on the embedded digits, as flags, and a way to see how a command fails."""

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
    """The embedded digits."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def flags(digits: Path) -> list[str]:
    """Flags of a small model with the recipe's augmentation, mixing and stochastic depth."""
    return [*_TINY.split(), "--data_path", str(digits)]


@pytest.fixture(scope="session")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of an unbroken run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    main([*flags, "--epochs", "2", "--output_dir", str(folder)])
    return folder


@pytest.fixture
def failure(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs the command and gives its exit code and its one line on stderr."""
    return lambda *argv: failure_of(main, argv, capsys)


def weights(folder: Path, name: str = "checkpoint.pth") -> dict[str, torch.Tensor]:
    """Weights and moving average in a checkpoint, under one dict."""
    content = torch.load(folder / name, weights_only=True)
    average = {f"ema.{key}": value for key, value in content["model_ema"].items()}
    return content["model"] | average
