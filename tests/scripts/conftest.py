"""Fixtures: checkpoints filled by golden/RECIPE.md, a web server for them, and data sets."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from classification.build import create_model
from datasets.embedded import write_digits
from datasets.scenes import SceneOptions, write_scenes
from detection.build import build_network
from tests.recipes import fill
from tests.scripts.small_zoo import make_zoo
from tests.web_server import Site, serve


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of `evaluate` for the digits and a few scenes, on the CPU."""
    root = tmp_path_factory.mktemp("data")
    digits = write_digits(root / "digits")
    scenes = write_scenes(root / "scenes", SceneOptions(train=1, val=5))
    return ["--imagenet", str(digits), "--coco", str(scenes), "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Checkpoints of a classifier and a detector, filled by recipe B."""
    folder = tmp_path_factory.mktemp("checkpoints")
    zoo = make_zoo(folder, "http://nowhere")
    configs = {row.name: row.config for row in zoo.rows}
    models = {
        "digits": create_model(configs["digits"], 10),
        "scenes": build_network(configs["scenes"]),
    }
    return {name: saved(fill(model)) for name, model in models.items()}


@pytest.fixture
def site(checkpoints: dict[str, bytes]) -> Iterator[Site]:
    """Web server of the two checkpoints."""
    with serve(**checkpoints) as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of checkpoints."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def saved(model: nn.Module) -> bytes:
    """Return the checkpoint of a model as bytes."""
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    return buffer.getvalue()
