"""Every file of configs/ablations/ documents itself, and its trainer accepts every cell."""

from pathlib import Path

import pytest

from scripts.ablate.cells import check_models, load_ablation
from scripts.ablate.file import read_file

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_trainer_accepts_every_cell_and_builds_its_model(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ablation = load_ablation(str(path))
    check_models(str(path), ablation.cells)
    file = ablation.file
    points = len(file.train_at["points"]) if file.train_at else 1
    assert len(ablation.cells) == len(file.seeds) * len(file.variants) * points


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_small_studies_have_five_seeds(path):
    seeds = read_file(str(path)).seeds
    is_published = path.stem.startswith(("imagenet", "coco"))
    assert len(seeds) >= (1 if is_published else 5)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_documents_itself(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = f"python -m scripts.ablate configs/ablations/{path.name}"
    for word in ("# Row ", "# Expected ", "# Cost ", "# Command ", command):
        assert any(word in line for line in header)
