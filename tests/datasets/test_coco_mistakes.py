"""Errors in a data set of COCO's format are reported in one sentence with file and problem."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from datasets import CocoImages, DataError, build_coco
from datasets.coco_annotations import read_annotations
from datasets.coco_masks import rle_problem
from tests.datasets.coco_files import FILES, changed, data

Png = Callable[[int], bytes]
Write = Callable[..., Path]

IMAGE = {"id": 5, "height": 9, "width": 13}


def rle(counts: Any, size: Any) -> dict[str, Any]:
    """Return the annotations with this RLE."""
    return changed(segmentation={"counts": counts, "size": size})


def test_missing_data_is_reported(coco_path: Path, tmp_path: Path) -> None:
    (coco_path / "val2017.zip").unlink()
    with pytest.raises(DataError, match=r"no images in .*expected the folder val2017 or val2017\."):
        build_coco("val", coco_path)
    (coco_path / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(DataError, match=r"no annotation file .*instances_train2017\.json"):
        build_coco("train", coco_path)
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        build_coco("train", tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected --coco_path, or images and annotations"):
        build_coco("train", images=tmp_path)
    with pytest.raises(DataError, match=r"no images at .*nowhere: expected a folder or a zip"):
        build_coco("val", coco_path, images=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split must be train or val, got 'test'"):
        build_coco("test", coco_path)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_missing_image_is_reported_at_the_start(
    form: str, pictures: Path, write_annotations: Write, png: Png, write_zip: Write, tmp_path: Path
) -> None:
    (pictures / "c.png").unlink()
    (pictures / "sub" / "b.png").unlink()
    path = pictures
    if form == "zip":
        files = {f"pictures/{FILES[key]}": png(key) for key in (5, 9)}
        path = write_zip(tmp_path / "pictures.zip", files)
    with pytest.raises(DataError) as caught:
        CocoImages(path, write_annotations(data()))
    message = str(caught.value)
    assert str(path) in message
    assert "sub/b.png, which the annotations name: 2 of 4 images are missing" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            changed(bbox=[1, float("nan"), 4, 3]),
            r"annotation 10: bbox must .*, got \[1, nan, 4, 3\]",
        ),
        (changed(bbox=[1, 2, float("inf"), 3]), "annotation 10: bbox must be four finite"),
        (changed(bbox=[1, 2, 3]), "annotation 10: bbox must be four finite"),
        (changed(bbox=["1", 2, 3, 4]), "annotation 10: bbox must be four finite"),
        (changed(bbox=None), "annotation 10: bbox must .*, got None"),
        (changed(bbox=None, id=None), "annotation number 1: bbox must .*, got None"),
        (changed(category_id=4), "annotation 10: category_id must .* the file lists, got 4"),
        (changed(segmentation=None), "annotation 10: segmentation is missing"),
        (changed(segmentation=[]), "annotation 10: segmentation is missing"),
        (changed(segmentation=[[0, 0, 1, 0, 1, float("nan")]]), "polygons of finite numbers"),
        (changed(segmentation=[1, 2, 3, 4, 5, 6]), "polygons of finite numbers"),
        (changed(segmentation={"counts": "x"}), "RLE segmentation lacks counts or size"),
        (rle([0, 4], [9, 13]), "annotation 10: RLE counts must add up to 117 pixels"),
        (rle("0", [9, 13]), "annotation 10: RLE counts must add up to 117 pixels"),
        (rle([-1, 118], [9, 13]), "RLE counts must be lengths of runs"),
        (rle(["9", 108], [9, 13]), "RLE counts must be lengths of runs"),
        (rle("~~~", [9, 13]), "RLE counts must be lengths of runs"),
        (rle("o" * 50, [9, 13]), "RLE counts must be lengths of runs"),
        (rle(None, [9, 13]), "RLE counts must be lengths of runs"),
        (rle([117], None), "RLE size must be the height and width"),
        (rle([117], [9.0, 13]), "RLE size must be the height and width"),
        (changed(segmentation=[[0, 0, 1e9, 0, 1, 1]]), "polygons of finite numbers, at most 100,"),
        (changed(iscrowd="1"), "annotation 10: iscrowd must be 0 or 1, got '1'"),
        (changed(id=2**63), r"annotations\[0\].id must be an integer from .*, got 9223"),
        (changed(image_id=[]), r"annotations\[0\].image_id must be an integer from .*, got"),
        (data(images=[IMAGE | {"file_name": "a\0b"}]), "names must not have NUL characters"),
        (data(images=[IMAGE | {"file_name": "\ud800"}]), "is not a COCO annotation file"),
        (data(images=[{"id": True, "file_name": "a"}]), r"images\[0\].id must be an integer"),
        (data(images=[{"id": 1.5, "file_name": "a"}]), r"images\[0\].id must be an integer"),
        (data(categories=[{"id": "1", "name": "a"}]), r"categories\[0\].id must be an integer"),
        (data(categories=[{"id": -8, "name": "a"}]), "must be an integer from 0 to .*, got -8"),
        (data(categories=[None]), r"categories\[0\] must be an object, got None"),
        (
            data(images=[{"id": 5, "file_name": "a.png", "height": "9", "width": 13}]),
            r"image 5: height and width must be positive integers, got \['9', 13\]",
        ),
        (changed(image_id=None), "not a COCO annotation file: 'image_id' is missing"),
        (data(images=[{"id": 5}]), "not a COCO annotation file: 'file_name' is missing"),
        (data(images=[{"id": "x", "file_name": "a.png"}]), "not a COCO annotation file"),
        (data(images=[{"id": 5, "file_name": "a.png"}]), "image 5 lacks height or width"),
        (data(images=[*data()["images"], data()["images"][1]]), "must be different, got 2 twice"),
        (
            data(annotations=[entry | {"image_id": 77} for entry in data()["annotations"]]),
            "none of the 4 annotations belongs to an image that the file lists",
        ),
        (data(images=[]), "lists no images"),
        (data(categories=[]), "lists no categories"),
        (data(images=7), "not a COCO annotation file"),
        (data(annotations=[7]), "not a COCO annotation file"),
        ({"images": [], "annotations": []}, "'categories' is missing"),
        ([1], "top level must be a JSON object, got list"),
    ],
    ids=lambda value: "" if isinstance(value, (dict, list)) else value[:40],
)
def test_invalid_annotations_are_reported_in_one_sentence(
    content: Any, message: str, pictures: Path, write_annotations: Write
) -> None:
    path = write_annotations(content)
    with pytest.raises(DataError, match=message) as caught:
        CocoImages(pictures, path, with_masks=True)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", ["e3", [117], "b1a0d0=", [50, 17, 20, 30]])
def test_the_runs_of_a_valid_rle_are_accepted(counts: Any) -> None:
    assert rle_problem({"counts": counts, "size": [9, 13]}) == ""


def test_compressed_runs_are_those_of_pycocotools() -> None:
    for seed in range(50):
        pixels = np.random.default_rng(seed).random((9, 13)) < seed / 50
        encoded = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
        problem = rle_problem({"counts": encoded["counts"].decode(), "size": [9, 13]})
        assert problem == ""
        cut = rle_problem({"counts": encoded["counts"].decode()[:-1], "size": [9, 13]})
        assert cut.startswith("RLE counts must")


def test_deep_nesting_and_long_numbers_are_not_annotations(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    for text in ("[" * 100_000, '{"images": [{"id": ' + "9" * 5000 + "}]}"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"instances\.json is"):
            read_annotations(path)


def test_a_missing_segmentation_is_allowed_without_masks(
    pictures: Path, write_annotations: Write
) -> None:
    assert (
        len(CocoImages(pictures, write_annotations(changed(segmentation=None)))[1][1]["labels"])
        == 2
    )


def test_a_truncated_annotation_file_is_reported(pictures: Path, write_annotations: Write) -> None:
    path = write_annotations(data())
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DataError, match=r"instances\.json is truncated, damaged or not JSON"):
        CocoImages(pictures, path)


def test_an_rle_of_another_size_names_the_image(pictures: Path, write_annotations: Write) -> None:
    rle = {"counts": [0, 4], "size": [2, 2]}
    dataset = CocoImages(pictures, write_annotations(changed(segmentation=rle)), with_masks=True)
    with pytest.raises(DataError, match=r"instances\.json: a\.png: RLE size"):
        dataset[1]


def test_boxes_without_area_are_counted_and_left_out(
    pictures: Path, write_annotations: Write, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        dataset = CocoImages(pictures, write_annotations(changed(bbox=[3, 3, -2, 4])))
    assert "1 boxes without width or height" in caplog.text
    assert dataset[1][1]["labels"].tolist() == [0]
