"""Every file of configs/ is read by its trainer, names its row, and builds what its name says."""

from pathlib import Path

import pytest

from classification.config import parse_args
from classification.models import PUBLISHED

FOLDER = Path(__file__).parents[2] / "configs" / "classification"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_every_published_model_and_its_baselines_have_a_file():
    names = {path.stem for path in FILES}
    baselines = {f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
    assert names == {*PUBLISHED, *baselines, "digits"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_is_read_and_documents_itself(path):
    config = parse_args(["--config", str(path)])
    if path.stem != "digits":
        assert config.model == path.stem
        assert config.batch_size == 128
    header = path.read_text().split("\nmodel:")[0]
    for word in ("# Row ", "# Expected ", "# Cost ", "# Command ", path.name):
        assert word in header
