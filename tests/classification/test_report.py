"""Details of evaluations: accuracy of each class, confusions, mistakes, for any processes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from classification.main import main
from classification.report import ClassReport

CLASSES = ["ant", "bee", "cat $^{", "dog", "猫"]
TARGETS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
PREDICTED = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 2, 4])
CONFIDENCE = torch.tensor([0.9, 0.8, 0.7, 0.9, 0.9, 0.6, 0.95, 0.7, 0.9, 0.5])


def filled(pictures: int = 0, batch_size: int = 4) -> ClassReport:
    """Return a report on the answers above; the brightness of an image is its number."""
    rest = ((1 - CONFIDENCE) / (len(CLASSES) - 1)).log()
    logits = rest[:, None].expand(-1, len(CLASSES)).clone()
    logits[torch.arange(len(TARGETS)), PREDICTED] = CONFIDENCE.log()
    images = torch.arange(len(TARGETS)).float()[:, None, None, None].expand(-1, 3, 8, 8) / 10
    report = ClassReport(CLASSES, pictures)
    parts = [images.split(batch_size), logits.split(batch_size)]
    parts.append(torch.stack([TARGETS, PREDICTED]).split(batch_size, 1))
    for number, batch in enumerate(zip(*parts, strict=True)):
        report.add("", number, *batch)
    report.gather(shared=False)
    return report


def test_accuracy_and_confusions_are_those_of_numpy():
    rows = filled().result().per_class["model"]
    matrix = np.zeros((5, 5), dtype=int)
    for target, predicted in zip(TARGETS.tolist(), PREDICTED.tolist(), strict=True):
        matrix[target, predicted] += 1
    for number, row in enumerate(rows):
        assert row["class"] == CLASSES[number]
        assert row["images"] == matrix[number].sum()
        wrong = {CLASSES[p]: n for p, n in enumerate(matrix[number].tolist()) if n and p != number}
        assert row["confused_with"] == wrong
    assert [row["acc1"] for row in rows] == [pytest.approx(200 / 3), 100, 25, 0, None]
    # The most frequent confusion comes first.
    assert list(rows[2]["confused_with"]) == ["bee", "ant"]


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_the_most_confident_mistakes_come_first(batch_size):
    report = filled(3, batch_size)
    # Images 2 and 7 have the same confidence and stay in the order of the data.
    assert [(t, p) for _, t, p, _ in report._mistakes] == [(2, 1), (0, 1), (2, 1)]
    brightness = [float(pixels.float().mean()) for *_, pixels in report._mistakes]
    assert brightness[1] < brightness[0] < brightness[2]
    pictures = report.result().pictures["mistakes"]
    assert len(pictures) == 3
    assert all(p.dtype == np.uint8 and p.shape[1:] == (224, 3) for p in pictures)


def test_fewer_mistakes_than_pictures_are_all_drawn():
    assert len(filled(100).result().pictures["mistakes"]) == 5
    assert filled(0).result().pictures == {}


@pytest.mark.parametrize("count", [5, 30, 1000], ids=lambda n: f"{n} classes")
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_number_of_classes_is_drawn(tmp_path, count):
    report = filled()
    report._classes += [f"class {number}" for number in range(5, count)]
    report.result().draw(tmp_path / "out")
    with Image.open(tmp_path / "out") as image:
        assert image.format == "PNG"
        assert 500 < image.height < 1200


def details(folder: Path) -> dict:
    return json.loads((folder / "metrics_per_class.json").read_text())


def test_the_details_of_a_training_are_those_of_its_last_evaluation(trained):
    found = details(trained)
    assert found.pop("epoch") == 1
    assert found.keys() == {"model", "ema"}
    record = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    for name, prefix in (("model", ""), ("ema", "ema_")):
        rows = found[name]
        assert sum(row["images"] for row in rows) == 359
        hits = sum(row["images"] * row["acc1"] for row in rows) / 359
        assert hits == pytest.approx(record[f"test_{prefix}acc1"])
    assert (trained / "metrics_per_class.png").exists()


def test_without_matplotlib_only_the_picture_is_missing(
    flags, trained, tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    caplog.set_level("INFO")
    run = [*flags, "--eval", "--resume", str(trained / "checkpoint.pth")]
    main([*run, "--output_dir", str(tmp_path)])
    assert details(tmp_path)["model"]
    assert not (tmp_path / "metrics_per_class.png").exists()
    assert (
        "metrics_per_class.png needs the package matplotlib: pip install matplotlib" in caplog.text
    )


def test_log_images_names_matplotlib_before_the_first_step(flags, tmp_path, monkeypatch, failure):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, line = failure(*flags, "--log_images", "1", "--output_dir", str(tmp_path))
    assert code == 1
    assert "--log-images needs the package matplotlib: pip install matplotlib" in line


def test_a_broken_validation_set_fails_before_the_first_step(flags, digits, tmp_path, failure):
    import shutil

    data = tmp_path / "digits"
    shutil.copytree(digits, data)
    for image in (data / "val").rglob("*.png"):
        image.write_bytes(b"")
    run = [*flags, "--data_set", "IMNET", "--data_path", str(data), "--output_dir"]
    code, line = failure(*run, str(tmp_path / "out"), "--epochs", "1")
    assert code == 1
    assert "images read are corrupt" in line
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_a_smoke_run_ends_after_some_steps(flags, tmp_path):
    main([*flags, "--max_steps", "3", "--output_dir", str(tmp_path), "--log_images", "2"])
    (record,) = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    assert "test_acc1" in record
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (content["epoch"], content["step"]) == (-1, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {"mistakes/0", "mistakes/1"}
    assert [event.step for event in events.Images("mistakes/0")] == [3]
