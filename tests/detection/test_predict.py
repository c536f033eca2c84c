"""Detections of the command, of Python and of exported files are the same, and COCO reads them."""

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

import detection
from datasets.image_files import find_images, read_image
from detection import saved
from detection.build import build_network
from detection.coco_eval import METRICS
from detection.detections import Detections
from detection.drawing import color_of, draw
from detection.main import main as train
from detection.predict import main
from detection.predictor import Detector
from engine import UserError, dump
from scripts.export.__main__ import main as export
from tests.commands import failure_of
from tests.detection.models import config
from tests.origins import evaluation
from tests.recipes import fill


@pytest.fixture(scope="session")
def checkpoint(trained: Path) -> str:
    """Return the path of a trained checkpoint."""
    return str(trained / "checkpoint.pth")


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a checkpoint with masks, which names no classes."""
    options = config(
        "--backbone small --backbone_norm batch --hidden_dim 32 --nheads 4 --dim_feedforward 48 "
        "--enc_layers 1 --dec_layers 1 --num_queries 7 --masks --num_classes 10 --image_size 64 "
        "--enc_rpe2d rpe-2.0-product-ctx-1-k"
    )
    path = tmp_path_factory.mktemp("masks") / "checkpoint.pth"
    categories = {label: label + 1 for label in range(10)}
    content = {"model": fill(build_network(options)).state_dict(), "args": dump(options)}
    torch.save(content | {"label_to_category": categories}, path)
    return str(path)


@pytest.fixture(scope="session")
def names(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file with ten class names."""
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text("".join(f"Ziffer {n} 数\n" for n in range(10)), encoding="utf-8")
    return str(path)


@pytest.fixture
def failure(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run the command, and return its exit code and its one line on stderr."""
    return lambda *argv: failure_of(main, ["--device", "cpu", *argv], capsys)


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Check that two lists of COCO results have the same objects."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one["image_id"], one["category_id"]) == (other["image_id"], other["category_id"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        x, y, w, h = np.array([one["bbox"], other["bbox"]]).T
        corners = torch.from_numpy(np.stack([x, y, x + w, y + h], 1))
        assert box_iou(corners[:1], corners[1:]) > 0.99


def predictions(path: Path, source: str, images: str, *flags: str) -> list[dict]:
    """Run the command at threshold 0, and return its JSON file, the boxes first by image."""
    words = [source, images, "--threshold", "0", "--json", str(path), "--num_workers", "0"]
    main([*words, "--device", "cpu", *flags])
    return json.loads(path.read_text())


def test_command_python_and_onnx_find_the_same(checkpoint, scenes, tmp_path):
    pytest.importorskip("onnxscript", reason="a package of requirements-export.txt is missing")
    images = str(scenes / "val2017.zip")
    expected = predictions(tmp_path / "command.json", checkpoint, images)
    exported = tmp_path / "model.onnx"
    export(["--checkpoint", checkpoint, "--output", str(exported)])
    assert_same(predictions(tmp_path / "onnx.json", str(exported), images), expected)
    assert detection.load(exported).classes == list("0123456789")
    detector = detection.load(checkpoint, device="cpu")
    files = [file.name for file in find_images([images])]
    for found, name in zip(detector(files, threshold=0), files, strict=True):
        entries = [entry for entry in expected if entry["file_name"] in name]
        boxes = torch.tensor([entry["bbox"] for entry in entries])
        boxes[:, 2:] += boxes[:, :2]
        assert found.categories == [entry["category_id"] for entry in entries]
        assert box_iou(found.boxes, boxes).diagonal().min() > 0.99
    image = read_image(files[0])
    for same in (image, np.asarray(image), files[0]):
        assert torch.equal(detector(same, threshold=0).boxes, detector(files[0], threshold=0).boxes)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_pycocotools_gives_the_metrics_of_the_evaluation(
    kind, checkpoint, segmenter, names, scenes, tmp_path
):
    source = checkpoint if kind == "bbox" else segmenter
    images = str(scenes / "val2017.zip")
    found = predictions(tmp_path / "found.json", source, images, "--classes", names)
    results = tmp_path / ("found.json" if kind == "bbox" else "found_segm.json")
    masks = json.loads(results.read_text())
    # The true annotations are imprecise copies of some detections, since a model that is trained
    # for seconds finds nothing: its AP would be 0.
    truth = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())
    truth["annotations"] = [
        {
            "id": number,
            "image_id": box["image_id"],
            "category_id": box["category_id"],
            "bbox": [box["bbox"][0] + number % 4, *box["bbox"][1:]],
            "area": box["bbox"][2] * box["bbox"][3],
            "iscrowd": 0,
            "segmentation": mask.get("segmentation"),
        }
        for number, (box, mask) in enumerate(zip(found, masks, strict=True), 1)
        if number % 3
    ]
    annotations = tmp_path / "truth.json"
    annotations.write_text(json.dumps(truth))
    run = ["--val_images", images, "--val_annotations", str(annotations), "--device", "cpu"]
    expected = evaluation(train, tmp_path / "eval", *run, "--num_workers", "0", "--resume", source)
    coco = COCO(str(annotations))
    judge = COCOeval(coco, coco.loadRes(str(results)), kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    prefix = "test_" if kind == "bbox" else "test_segm_"
    metrics = [expected[f"{prefix}{name}"] for name in METRICS]
    assert metrics[0] > 0.1
    assert judge.stats.tolist() == pytest.approx(metrics, abs=1e-6)


def test_pictures_are_drawn_and_never_overwritten(segmenter, names, scenes, tmp_path, failure):
    output = tmp_path / "drawn"
    image = str(scenes / "val2017.zip" / "val2017" / "000000000049.jpg")
    words = [segmenter, image, "--classes", names, "--threshold", "0", "--output_dir", str(output)]
    main([*words, "--device", "cpu"])
    (picture,) = output.iterdir()
    assert picture == output / "000000000049.jpg"
    # 96 pixels are enlarged to at least 300.
    assert Image.open(picture).size == (384, 384)
    code, line = failure(*words)
    assert (code, f"{picture} must not exist: --force overwrites" in line) == (2, True)
    before = picture.read_bytes()
    picture.write_bytes(b"old")
    main([*words, "--device", "cpu", "--force"])
    assert picture.read_bytes() == before


def test_pictures_of_the_same_name_are_kept_apart(checkpoint, scenes, tmp_path, monkeypatch):
    image = read_image(str(scenes / "val2017.zip" / "val2017" / "000000000049.jpg"))
    for name in ("a/x.jpg", "b/x.jpg", "b/x_2.jpg", "c/x.bmp", "d/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    main([checkpoint, "a", "b", "c", "d", "--output_dir", "out", "--device", "cpu"])
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"x.jpg", "x_2.jpg", "x_2_2.jpg", "x.png", "x_2.png"}


def test_images_are_not_replaced_by_pictures(checkpoint, scenes, tmp_path, failure):
    image = read_image(str(scenes / "val2017.zip" / "val2017" / "000000000049.jpg"))
    image.save(tmp_path / "x.jpg")
    before = (tmp_path / "x.jpg").read_bytes()
    code, line = failure(checkpoint, str(tmp_path), "--output_dir", str(tmp_path), "--force")
    assert (code, "--output-dir must not be the folder of the images" in line) == (2, True)
    assert (tmp_path / "x.jpg").read_bytes() == before


def test_members_of_an_archive_cannot_leave_the_output_folder(checkpoint, scenes, tmp_path):
    data = (scenes / "val2017.zip" / "val2017" / "000000000049.jpg").as_posix()
    read_image(data).save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.write(tmp_path / "x.png", "../../up.png")
    with zipfile.ZipFile(tmp_path / "evil.zip") as archive:
        assert archive.namelist() == ["../../up.png"]
    output = tmp_path / "deep" / "out"
    archive = str(tmp_path / "evil.zip")
    main([checkpoint, archive, "--output_dir", str(output), "--device", "cpu"])
    assert set(tmp_path.rglob("*.png")) == {tmp_path / "x.png", output / "up.png"}


def test_labels_without_a_category_are_left_out():
    metadata = saved.describe(config(), ["a", "b"], {0: 7, 1: 9})
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0], [0, 8.0, 0, 0]]])
    boxes = torch.full((1, 4, 4), 0.5)
    boxes[0, 3] = torch.nan
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    cpu = torch.device("cpu")
    detector = Detector(lambda *_: outputs, metadata, ["a", "b"], cpu, torch.float32)
    found = detector(Image.new("RGB", (40, 20)), threshold=0)
    assert found.categories == [7, 9]
    assert found.boxes.tolist() == [[10, 5, 30, 15]] * 2


def test_unreadable_images_are_skipped_named_and_counted(checkpoint, scenes, tmp_path, capsys):
    folder = tmp_path / "fotos"
    folder.mkdir()
    image = read_image(str(scenes / "val2017.zip" / "val2017" / "000000000049.jpg"))
    for number in range(12):
        image.save(folder / f"写真 {number}.png")
    (folder / "写真 3.png").write_bytes(b"<html>not found</html>")
    output = tmp_path / "found.json"
    with pytest.raises(UserError, match="1 of 12 images could not be read"):
        main([
            checkpoint, str(folder), "--threshold", "0", "--json", str(output), "--device", "cpu",
            "--num_workers", "2", "--batch_size", "3",
        ])  # fmt: skip
    assert "写真 3.png must be an image, got a web page" in capsys.readouterr().err
    found = json.loads(output.read_text())
    assert len({entry["image_id"] for entry in found}) == 11
    assert {entry["file_name"] for entry in found} == {
        f"写真 {number}.png" for number in range(12) if number != 3
    }


def test_image_ids_are_those_of_the_annotations(checkpoint, scenes, tmp_path, failure):
    images = str(scenes / "val2017.zip")
    truth = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())
    for entry in truth["images"]:
        entry["id"] += 5000
    (tmp_path / "ids.json").write_text(json.dumps(truth))
    ids = ("--annotations", str(tmp_path / "ids.json"))
    shifted = predictions(tmp_path / "a.json", checkpoint, images, *ids)
    plain = predictions(tmp_path / "b.json", checkpoint, images)
    assert [e["image_id"] for e in shifted] == [e["image_id"] + 5000 for e in plain]
    truth["images"].pop()
    (tmp_path / "ids.json").write_text(json.dumps(truth))
    code, line = failure(checkpoint, images, *ids)
    assert (code, "must list the image val2017/000000000069.jpg" in line) == (1, True)


def test_objects_are_printed_without_an_output(checkpoint, scenes, capsys):
    image = str(scenes / "val2017.zip" / "val2017" / "000000000049.jpg")
    main([checkpoint, image, "--threshold", "1", "--device", "cpu"])
    assert capsys.readouterr().out == f"{image}: no objects\n"


def test_mistakes_are_one_sentence(checkpoint, segmenter, names, scenes, tmp_path, failure):
    image = str(scenes / "val2017.zip" / "val2017" / "000000000049.jpg")
    torch.save({"model": {"head.weight": torch.zeros(3, 4)}}, tmp_path / "deit.pth")
    weights = torch.load(checkpoint, weights_only=True)["model"]
    torch.save({"model": weights}, tmp_path / "bare.pth")
    (tmp_path / "short.txt").write_text("one\n")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for argv, code, words in [
        ([checkpoint], 2, "IMAGES"),
        ([checkpoint, image, "--threshold", "1.5"], 2, "--threshold must be less than"),
        ([checkpoint, image, "--threshold", "-1"], 2, "--threshold must be greater"),
        ([checkpoint, str(tmp_path / "none")], 1, "no image found in"),
        ([str(tmp_path / "deit.pth"), image], 1, "must be the checkpoint of a detector"),
        ([str(tmp_path / "bare.pth"), image], 2, "does not name its enc_rpe2d: give --enc-rpe2d"),
        ([segmenter, image], 1, "has no class names: --classes must be a text file with 10 lines"),
        ([segmenter, image, "--classes", str(tmp_path / "short.txt")], 1, "must be 10 names"),
        ([segmenter, image, "--classes", "none.txt"], 1, "--classes none.txt"),
        ([checkpoint, image, "--use_ema"], 1, "has no EMA weights"),
        ([str(tmp_path / "bad.onnx"), image], 1, "onnxruntime cannot read"),
        ([checkpoint, image, "--hidden_dim", "32"], 1, "does not fit DETR"),
    ]:  # fmt: skip
        found, line = failure(*argv)
        assert (found, words in line) == (code, True), line


def test_published_weights_have_the_classes_of_coco(tmp_path):
    flags = "--backbone small --backbone_norm batch --hidden_dim 16 --nheads 2 --enc_layers 1 "
    flags += (
        "--dec_layers 1 --dim_feedforward 16 --num_queries 3 --enc_rpe2d rpe-2.0-product-ctx-1-k"
    )
    options = config(flags)
    torch.save({"model": fill(build_network(options)).state_dict()}, tmp_path / "bare.pth")
    shape = {name: getattr(options, name) for name in options.model_fields_set}
    shape.pop("backbone_weights")
    detector = detection.load(tmp_path / "bare.pth", device="cpu", **shape)
    assert len(detector.classes) == 91
    assert [detector.classes[n] for n in (0, 1, 12, 13, 90)] == [
        "N/A", "person", "N/A", "stop sign", "toothbrush",
    ]  # fmt: skip
    (found,) = detector([Image.new("RGB", (40, 30))], threshold=0)
    assert found.categories == found.labels.tolist()
    assert detector.transform(Image.new("RGB", (40, 30))).shape == (3, 800, 1066)


def test_without_matplotlib_pictures_are_refused_before_the_prediction(
    checkpoint, tmp_path, monkeypatch, failure
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, line = failure(checkpoint, "nowhere.png", "--output_dir", str(tmp_path))
    assert code == 1
    assert line.endswith("--output-dir needs the package matplotlib: pip install matplotlib")


@pytest.mark.parametrize("side", [40, 300, 4000])
def test_lines_and_text_grow_with_the_image(side):
    boxes = torch.tensor([[0.3, 0.3, 0.8, 0.8], [-0.2, -0.1, 1.4, 0.5]]) * side
    found = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), ["Öl", "b"], [1, 2])
    gray = Image.new("RGB", (side, side), (128, 128, 128))
    picture = np.asarray(draw(gray, found))
    factor = picture.shape[0] // side
    assert picture.shape[0] >= 300
    assert factor == (8 if side == 40 else 1)
    colored = (picture == color_of(0)).all(2)
    middle = colored[:, round(0.7 * side * factor)].sum()
    # Upper and lower line, and perhaps the background of the text.
    assert middle >= 2 * max(2, round(side * factor / 250))
    assert not np.array_equal(np.asarray(gray)[0, 0], picture[0, 0])


def test_classes_have_different_colors():
    assert len({color_of(label) for label in range(91)}) == 91
