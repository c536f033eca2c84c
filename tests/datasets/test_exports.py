"""Exports in COCO's format, written as Roboflow, CVAT and Label Studio write them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from datasets import CocoImages, DataError, SplitOptions, build_coco
from datasets.check import check_coco
from detection.config import parse_args
from detection.data import build_split
from tests.datasets.check_data import SIZE, picture

SPLIT = SplitOptions(0.25, seed=1)


def write(path: Path, content: dict[str, Any] | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def roboflow(root: Path, splits: tuple[str, ...] = ("train", "valid", "test")) -> Path:
    """Write a Roboflow export: annotations among the images, ids from 0, a placeholder."""
    for number, split in enumerate(splits):
        names = [f"{number}{i}_jpg.rf.9d2126a682ae.png" for i in range(4)]
        for i, name in enumerate(names):
            write(root / split / name, picture(10 * number + i))
        content = {
            "info": {"year": "2024", "version": "2", "description": "Exported from roboflow.com"},
            "licenses": [{"id": 1, "url": "", "name": "CC BY 4.0"}],
            "categories": [
                {"id": 0, "name": "Workers", "supercategory": "none"},
                {"id": 1, "name": "head", "supercategory": "Workers"},
                {"id": 2, "name": "helmet", "supercategory": "Workers"},
            ],
            "images": [
                {"id": i, "license": 1, "file_name": name, "height": SIZE[1], "width": SIZE[0]}
                for i, name in enumerate(names)
            ],
            "annotations": [
                {
                    "id": i,
                    "image_id": i // 2,
                    "category_id": 1 + i % 2,
                    "bbox": [3, 4, 10.5, 12],
                    "area": 126,
                    "segmentation": [],
                    "iscrowd": 0,
                }
                for i in range(8)
            ],
        }
        write(root / split / "_annotations.coco.json", content)
    return root


def cvat(root: Path, subset: str = "default", images: str = "images", first: int = 1) -> Path:
    """Write a CVAT export (COCO 1.0): images in a folder, ids from 1."""
    names = [f"frame_{i:06d}.PNG" for i in range(first, first + 8)]
    for i, name in enumerate(names, first):
        write(root / images / name, picture(i))
    content = {
        "licenses": [{"name": "", "id": 0, "url": ""}],
        "info": {"contributor": "", "date_created": "", "description": "", "year": ""},
        "categories": [
            {"id": 1, "name": "Car", "supercategory": ""},
            {"id": 2, "name": "Bus", "supercategory": ""},
        ],
        "images": [
            {
                "id": i,
                "width": SIZE[0],
                "height": SIZE[1],
                "file_name": name,
                "license": 0,
                "flickr_url": "",
                "coco_url": "",
                "date_captured": 0,
            }
            for i, name in enumerate(names, 1)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": 1 + i // 2,
                "category_id": 1 + i % 2,
                "segmentation": [],
                "area": 120.0,
                "bbox": [1.5, 2.0, 10.0, 12.0],
                "iscrowd": 0,
                "attributes": {"occluded": False, "rotation": 0.0},
            }
            for i in range(16)
        ],
    }
    write(root / "annotations" / f"instances_{subset}.json", content)
    return root


def label_studio(root: Path) -> Path:
    """Write a Label Studio export: result.json and images/, ids from 0, a real category 0."""
    names = [f"images/{i:02d}ab-photo.png" for i in range(8)]
    for i, name in enumerate(names):
        write(root / name, picture(i))
    content = {
        "images": [
            {"width": SIZE[0], "height": SIZE[1], "id": i, "file_name": name}
            for i, name in enumerate(names)
        ],
        "categories": [{"id": 0, "name": "Airplane"}, {"id": 1, "name": "Car"}],
        "annotations": [
            {
                "id": i,
                "image_id": i // 2,
                "category_id": i % 2,
                "segmentation": [],
                "bbox": [4.5, 5.25, 10.0, 12.0],
                "ignore": 0,
                "iscrowd": 0,
                "area": 120.0,
            }
            for i in range(16)
        ],
        "info": {"year": 2024, "version": "1.0", "contributor": "Label Studio"},
    }
    write(root / "result.json", content)
    return root


def names_of(data: CocoImages) -> set[str]:
    return {entry["file_name"] for entry in data.coco.dataset["images"]}


@pytest.mark.parametrize("valid", ["valid", "val", "validation"])
def test_a_roboflow_export_needs_only_its_path(valid: str, tmp_path: Path) -> None:
    root = roboflow(tmp_path, ("train", valid, "test"))
    config = parse_args(["--coco_path", str(root)])
    train = build_split(config, "train")
    val = build_split(config, "val", train.dataset.label_to_category)
    assert (len(train), len(val)) == (4, 4)
    assert train.classes == val.classes == ["head", "helmet"]
    assert train.dataset.label_to_category == {0: 1, 1: 2}
    image, target = val[0]
    assert image.shape[0] == 3
    assert target["labels"].tolist() == [0, 1]
    report = check_coco(root, read_images=True)
    assert report.findings == []
    assert report.summaries[0].counts == {"head": 4, "helmet": 4}


def test_a_category_0_with_objects_is_a_class(tmp_path: Path) -> None:
    root = roboflow(tmp_path)
    path = root / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    write(path, content)
    assert build_coco("train", root).classes == ["Workers", "head", "helmet"]


def test_a_placeholder_with_the_name_of_a_class_is_left_out(tmp_path: Path) -> None:
    root = roboflow(tmp_path)
    path = root / "train" / "_annotations.coco.json"
    write(path, json.loads(path.read_text().replace("Workers", "head")))
    data = build_coco("train", root)
    assert data.classes == ["head", "helmet"]
    assert data.label_to_category == {0: 1, 1: 2}


@pytest.mark.parametrize(
    "export",
    [cvat, label_studio, lambda root: cvat(root, images="images/default")],
    ids=["cvat", "label_studio", "cvat_subfolder"],
)
def test_an_export_in_one_file_is_split(
    export: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = export(tmp_path / "data")
    with pytest.raises(DataError, match=r"no annotations of train: --train_val_split 0\.2"):
        build_coco("train", root)
    flags = ["--coco_path", str(root), "--train_val_split", "0.25", "--split_seed", "1"]
    with caplog.at_level(logging.INFO):
        train, val = (build_split(parse_args(flags), name).dataset for name in ("train", "val"))
    assert (len(train), len(val)) == (6, 2)
    assert not names_of(train) & names_of(val)
    assert len(train.classes) == 2
    assert len(train.coco.anns) == 12
    assert len(val.coco.anns) == 4
    assert val[0][1]["boxes"].shape == (2, 4)
    (saved,) = root.rglob("train_val_split_*_0.25_seed1.json")
    assert saved.parent == train.annotation_file.parent
    assert f"saved in {saved}" in caplog.text
    assert set(json.loads(saved.read_text())["val"]) == names_of(val)
    report = check_coco(root, read_images=True, train_val_split=SPLIT)
    assert report.findings == []
    assert [summary.images for summary in report.summaries] == [6, 2]


def test_category_0_of_label_studio_is_a_class(tmp_path: Path) -> None:
    data = build_coco("train", label_studio(tmp_path), train_val_split=SPLIT)
    assert data.classes == ["Airplane", "Car"]


@pytest.mark.parametrize("images", ["images/{}", "images"], ids=["own_folders", "one_folder"])
def test_subsets_of_cvat_are_splits(images: str, tmp_path: Path) -> None:
    cvat(tmp_path, "Train", images.format("Train"))
    cvat(tmp_path, "Validation", images.format("Validation"), first=100)
    train, val = (build_coco(split, tmp_path) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 8)
    assert not names_of(train) & names_of(val)


def test_own_files_can_be_split(tmp_path: Path) -> None:
    root = label_studio(tmp_path)
    flags = ["--train_images", str(root), "--train_annotations", str(root / "result.json")]
    config = parse_args([*flags, "--train_val_split", "0.25"])
    assert [len(build_split(config, split)) for split in ("train", "val")] == [6, 2]
    with pytest.raises(DataError, match=r"no data for val: expected .* or --train_val_split"):
        build_split(parse_args(flags), "val")


def test_a_roboflow_export_without_valid_can_be_split(tmp_path: Path) -> None:
    root = roboflow(tmp_path, ("train",))
    with pytest.raises(DataError, match=r"no annotations of val: --train_val_split 0\.2 uses a pa"):
        build_coco("val", root)
    parts = [build_coco(split, root, train_val_split=SPLIT) for split in ("train", "val")]
    assert [len(part) for part in parts] == [3, 1]


@pytest.mark.parametrize("layout", ["roboflow", "coco"])
def test_data_with_a_validation_split_is_not_split(
    layout: str, tmp_path: Path, coco_path: Path
) -> None:
    root = roboflow(tmp_path / "roboflow") if layout == "roboflow" else coco_path
    with pytest.raises(DataError, match="has a validation split: drop --train_val_split"):
        build_coco("train", root, train_val_split=SPLIT)


def test_an_export_without_its_images_is_reported(tmp_path: Path) -> None:
    root = cvat(tmp_path)
    for file in (root / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"there is no image frame_000001\.PNG of .*expected it in"):
        build_coco("train", root, train_val_split=SPLIT)


@pytest.mark.parametrize("fraction", ["0", "1", "-0.1"])
def test_a_fraction_out_of_range_is_refused(
    fraction: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--coco_path", "x", f"--train_val_split={fraction}"])
    assert "--train-val-split must be" in capsys.readouterr().err
