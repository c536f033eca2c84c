"""Every file of configs/ is read by its trainer, names its row, and builds what its name says."""

from pathlib import Path

import pytest

from classification.config import parse_args
from classification.models import PUBLISHED
from detection.config import parse_args as parse_detection_args

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted((CONFIGS / "classification").glob("*.yaml"))
SMALL = ("one_gpu_24gb", "one_gpu_8gb", "finetune")
DETECTION = sorted((CONFIGS / "detection").glob("*.yaml"))


def test_every_published_model_and_its_baselines_have_a_file():
    names = {path.stem for path in FILES}
    baselines = {f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
    assert names == {*PUBLISHED, *baselines, "digits", "directions", "deit_recipe", *SMALL}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_read_and_documents_itself(path):
    config = parse_args(["--config", str(path)])
    if path.stem not in ("digits", "directions", "deit_recipe", *SMALL):
        assert config.model == path.stem
        assert config.batch_size == 128
    assert_documented(path)


@pytest.mark.parametrize("path", DETECTION, ids=lambda path: path.stem)
def test_detection_file_is_read_and_documents_itself(path):
    config = parse_detection_args(["--config", str(path)])
    if path.stem.startswith("rpe-"):
        spec, epochs, _ = path.stem.split("_")
        assert (config.enc_rpe2d, config.epochs) == (spec, int(epochs))
        assert config.lr_drop == {150: 100, 300: 200}[config.epochs]
    assert_documented(path)


def assert_documented(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("# Row ", "# Expected ", "# Cost ", "# Command ", path.name):
        assert any(word in line for line in header)
