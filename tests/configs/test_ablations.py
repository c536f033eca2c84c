"""Every file of configs/ablations/ documents itself, and its trainer accepts every cell."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from classification import config as classification
from detection import config as detection

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
TRAINERS = {"classification": classification.parse_args, "detection": detection.parse_args}
KEYS = {
    *("trainer", "config", "metric", "seeds", "options", "variants", "train_at", "evaluate_at"),
}


def cells(content: dict) -> Iterator[tuple[tuple[str, object, object], dict]]:
    """Yield the label and the options of each cell at each of its points, without the seeds."""
    points = [content.get(key, {}).get("points", {"": {}}) for key in ("train_at", "evaluate_at")]
    for label, variant in content["variants"].items():
        for train_at, at_training in points[0].items():
            for evaluate_at, at_evaluation in points[1].items():
                options = content.get("options", {}) | variant | at_training | at_evaluation
                yield (label, train_at, evaluate_at), options


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_trainer_accepts_every_cell_and_no_two_are_equal(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    assert content.keys() <= KEYS
    base = yaml.safe_load((ROOT / content["config"]).read_text())
    assert len(set(content["seeds"])) == len(content["seeds"])
    found = {}
    for label, options in cells(content):
        file = tmp_path / "cell.yaml"
        file.write_text(yaml.safe_dump(base | options | {"seed": content["seeds"][0]}))
        found[label] = TRAINERS[content["trainer"]](["--config", str(file)])
    assert len({repr(config) for config in found.values()}) == len(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_small_studies_have_five_seeds(path):
    seeds = yaml.safe_load(path.read_text())["seeds"]
    is_published = path.stem.startswith(("imagenet", "coco"))
    assert len(seeds) >= (1 if is_published else 5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_documents_itself(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = f"python -m scripts.ablate configs/ablations/{path.name}"
    for word in ("# Row ", "# Expected ", "# Cost ", "# Command ", command):
        assert any(word in line for line in header)
