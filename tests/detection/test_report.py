"""Details of evaluations: metrics of each class in the files of a run, and drawn predictions."""

import json

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detection.drawing import draw_objects
from detection.main import main
from detection.report import DetectionReport
from tests.detection.test_training import last_line

CLASSES = ["cat", "dog $^{", "犬"]


def sample(height: int, width: int, masks: bool = False):
    """Return an image of half the original size in a padded batch, with truth and detections."""
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.4], [0.7, 0.5, 0.3, 0.3]])
    original = torch.tensor([2 * width, 2 * height, 2 * width, 2 * height])
    corners = torch.tensor([[0.2, 0.2, 0.4, 0.6], [0.55, 0.35, 0.85, 0.65]]) * original
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "size": torch.tensor([height, width]),
        "orig_size": torch.tensor([2 * height, 2 * width]),
        "image_id": torch.tensor([7]),
    }
    # The third detection has a low score and is not drawn.
    found = {
        "boxes": torch.cat([corners, original[None] / 2]),
        "labels": torch.tensor([1, 2, 0]),
        "scores": torch.tensor([0.9, 0.8, 0.3]),
    }
    if masks:
        target["masks"] = torch.rand(2, height, width) > 0.5
        found["masks"] = torch.rand(3, 2 * height, 2 * width) > 0.5
    return torch.zeros(3, height + 30, width + 50), target, found


def pictures_of(report: DetectionReport) -> list:
    report.add_metrics("", {"bbox": []})
    return report.result().pictures["predictions"]


@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (64, 48), (1333, 700)], ids=["as is", "enlarged", "reduced"]
)
def test_right_predictions_are_drawn_at_the_place_of_the_truth(height, width):
    report = DetectionReport(CLASSES, 1)
    image, target, found = sample(height, width)
    report.add_images(image[None], [target], [found])
    (picture,) = pictures_of(report)
    scale = min(max(max(height, width), 224), 640) / max(height, width)
    shown = round(scale * width)
    assert picture.shape[1] == 2 * shown + 8
    x, y = round(0.2 * scale * width), round(0.4 * scale * height)
    left, right = picture[y, x - 3 : x + 4], picture[y, x + shown + 5 : x + shown + 12]
    background = picture[2, 2]
    for line in (left, right):
        assert 2 <= (line != background).any(-1).sum() <= 4
    assert (left == right).all()


def test_masks_of_any_size_and_no_objects_are_drawn():
    report = DetectionReport(CLASSES, 3)
    image, target, found = sample(90, 120, masks=True)
    report.add_images(image[None], [target], [found])
    found["labels"] += 5  # A model may have more classes than the data.
    report.add_images(image[None], [target], [found])
    nothing = {name: value[:0] for name, value in found.items()}
    empty = target | {name: target[name][:0] for name in ("boxes", "labels", "masks")}
    report.add_images(torch.stack([image, image]), [empty, empty], [nothing, nothing])
    pictures = pictures_of(report)
    assert len(pictures) == 3
    assert pictures[0].std() > pictures[2].std()


def test_boxes_beyond_the_picture_are_clipped():
    pixels = torch.zeros(3, 50, 60, dtype=torch.uint8)
    boxes = torch.tensor([[-20.0, -20, 100, 100], [70, 70, 90, 90], [5, 5, 5, 5]])
    drawn = draw_objects(pixels, boxes, ["a", "b", "c"], [0, 1, 2])
    assert drawn.shape == pixels.shape
    assert pixels.sum() == 0
    assert drawn[:, 0, 30].sum() > 0


@pytest.mark.parametrize("kinds", [("bbox",), ("bbox", "segm")], ids=len)
@pytest.mark.parametrize("count", [0, 1, 300], ids=lambda n: f"{n} classes")
def test_any_number_of_classes_is_drawn(tmp_path, kinds, count):
    row = {"objects": 3, "AP": 0.5, "AP50": 0.6, "AR100": 0.7}
    rows = [row | {"class": f"{n} $^{{", "category_id": n} for n in range(count)]
    rows.append({"class": "none", "category_id": count, "objects": 0, "AP": -1, "AR100": -1})
    report = DetectionReport(CLASSES)
    report.add_metrics("", dict.fromkeys(kinds, rows))
    report.result().draw(tmp_path / "out")
    with Image.open(tmp_path / "out") as image:
        assert image.format == "PNG"
        assert image.height < 1300


def test_the_details_of_a_training_are_those_of_its_last_evaluation(trained):
    found = json.loads((trained / "metrics_per_class.json").read_text())
    assert found.pop("epoch") == 1
    rows = found["model"]["bbox"]
    assert [row["class"] for row in rows] == [str(digit) for digit in range(10)]
    present = [row for row in rows if row["objects"]]
    for name in ("AP", "AP50", "AR100"):
        mean = sum(row[name] for row in present) / len(present)
        assert mean == pytest.approx(last_line(trained)[f"test_{name}"])
    assert (trained / "metrics_per_class.png").exists()


def test_a_smoke_run_with_masks_sends_pictures_and_warns_of_no_missing_images(
    flags, tmp_path, caplog
):
    run = [*flags, "--masks", "--model_ema", "--max_steps", "2", "--log_images", "3"]
    main([*run, "--output_dir", str(tmp_path)])
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (content["epoch"], content["step"]) == (-1, 2)
    found = json.loads((tmp_path / "metrics_per_class.json").read_text())
    assert found.keys() == {"epoch", "model", "ema"}
    assert found["ema"].keys() == {"bbox", "segm"}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {f"predictions/{number}" for number in range(3)}
    assert "annotated images" not in caplog.text
    assert "sanity check" in (tmp_path / "run.log").read_text()
    line = next(text for text in caplog.messages if "class_error" in text)
    assert len(line) <= 110


def test_a_broken_validation_set_fails_before_the_first_step(
    model_flags, scenes, tmp_path, failure
):
    own = ["--train_images", str(scenes / "train2017.zip")]
    own += ["--train_annotations", str(scenes / "annotations" / "instances_train2017.json")]
    annotations = scenes / "annotations" / "instances_val2017.json"
    own += ["--val_images", str(tmp_path / "images"), "--val_annotations", str(annotations)]
    (tmp_path / "images").mkdir()
    for image in json.loads(annotations.read_text())["images"]:
        (tmp_path / "images" / image["file_name"]).write_bytes(b"no image")
    code, line = failure(*model_flags, *own, "--output_dir", str(tmp_path / "out"))
    assert code == 1
    assert "images read are corrupt" in line
    assert not (tmp_path / "out" / "checkpoint.pth").exists()
