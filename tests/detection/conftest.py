"""Fixtures: a small run on a few built-in scenes, and a check of failing commands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from datasets.scenes import SceneOptions, write_scenes
from detection.main import main
from tests.commands import failure_of

_TINY = (
    "--backbone small --backbone_weights none --backbone_norm batch --backbone_stride 16 "
    "--hidden_dim 16 --nheads 2 --dim_feedforward 32 --enc_layers 1 --dec_layers 2 "
    "--num_queries 8 --enc_rpe2d rpe-2.0-product-ctx-1-qkv --batch_size 8 --num_workers 0 "
    "--image_size 64 --lr 1e-3 --lr_backbone 1e-3 --device cpu"
)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a few scenes in zips.

    The number of validation images is divisible neither by 8, the batch size, nor by 2.
    """
    root = tmp_path_factory.mktemp("data") / "scenes"
    return write_scenes(root, SceneOptions(train=48, val=21))


@pytest.fixture(scope="session")
def model_flags() -> list[str]:
    """Return the flags of the model and its training, without data."""
    return _TINY.split()


@pytest.fixture(scope="session")
def flags(model_flags: list[str], scenes: Path) -> list[str]:
    """Return the flags of a run with the augmentation of DETR."""
    return [*model_flags, "--coco_path", str(scenes)]


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
