"""Tests of data sets in COCO's format: targets, labels, masks, folders and zips, loaders."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from datasets import (
    CocoImages,
    CorruptImageError,
    DataError,
    DistributedShuffleSampler,
    ResilientDataset,
    SeededDataset,
    build_coco,
    build_coco_transforms,
    collate,
)
from tests.datasets.coco_files import ANNOTATIONS, FILES, data, square
from tests.recipes import golden_json

Png = Callable[[int], bytes]
Write = Callable[..., Path]

COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Check that two targets are equal."""
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", ["mixed", "none", "only_crowd"])
def test_targets_equal_the_recorded_targets(
    case: str, tmp_path: Path, write_annotations: Write
) -> None:
    recorded = golden_json("transforms")["coco_prepare"][case]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "images" / "7.jpg")
    path = write_annotations(
        {
            "images": [{"id": 7, "file_name": "7.jpg"}],
            "annotations": [entry | {"image_id": 7} for entry in recorded["annotations"]],
            "categories": [{"id": number, "name": f"c{number}"} for number in COCO_IDS],
        }
    )
    _, target = CocoImages(tmp_path / "images", path)[0]
    assert {name: value.tolist() for name, value in target.items()} == recorded["target"]
    assert {name: list(value.shape) for name, value in target.items()} == recorded["shapes"]
    dtypes = {name: str(value.dtype) for name, value in target.items()}
    # One difference: the recorded iscrowd is float32 if there is no object.
    assert dtypes == recorded["dtypes"] | {"iscrowd": "torch.int64"}


def test_samples_are_sorted_by_image_id_and_have_their_objects(
    pictures: Path, write_annotations: Write, png: Png
) -> None:
    dataset = CocoImages(pictures, write_annotations(data()))
    assert len(dataset) == 4
    for (image, target), key in zip((dataset[i] for i in range(4)), sorted(FILES), strict=True):
        assert np.array_equal(image, Image.open(pictures / FILES[key]))
        assert target["image_id"].tolist() == [key]
        assert target["orig_size"].tolist() == target["size"].tolist() == [9, 13]
    targets = [dataset[i][1] for i in range(4)]
    assert targets[0]["boxes"].tolist() == [[0, 0, 13, 9]]
    assert targets[1]["boxes"].tolist() == [[1, 2, 5, 5], [6, 1, 9.5, 9]]
    assert [len(target["labels"]) for target in targets] == [1, 2, 0, 0]
    assert targets[1]["area"].tolist() == [6.5, 6.5]
    assert "masks" not in targets[1]


def test_labels_have_no_gaps(pictures: Path, write_annotations: Write) -> None:
    dataset = CocoImages(pictures, write_annotations(data()))
    assert dataset.label_to_category == {0: 3, 1: 7, 2: 40}
    assert dataset.classes == ["dog", "cat", "cow"]
    assert dataset.num_classes == 3
    assert dataset[1][1]["labels"].tolist() == [1, 0]


def test_labels_of_coco_are_its_category_ids(pictures: Path, write_annotations: Write) -> None:
    categories = [{"id": number, "name": f"c{number}"} for number in COCO_IDS]
    dataset = CocoImages(pictures, write_annotations(data(categories=categories)))
    assert dataset.num_classes == 91
    assert dataset.label_to_category == {number: number for number in range(91)}
    assert [dataset.classes[i] for i in (0, 1, 12, 90)] == ["N/A", "c1", "N/A", "c90"]
    assert dataset[1][1]["labels"].tolist() == [7, 3]


def test_validation_uses_the_labels_of_training(pictures: Path, write_annotations: Write) -> None:
    known = {0: 40, 1: 7, 2: 3, 3: 99}
    dataset = CocoImages(pictures, write_annotations(data()), label_map=known)
    assert dataset.label_to_category == known
    assert dataset.classes == ["cow", "cat", "dog", "N/A"]
    assert dataset[1][1]["labels"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"objects of category 40 \(cow\).*label map.*lacks"):
        CocoImages(pictures, write_annotations(data()), label_map={0: 3, 1: 7})


def test_masks_are_decoded_from_polygons_and_rle(pictures: Path, write_annotations: Write) -> None:
    box = torch.zeros(9, 13, dtype=torch.bool)
    box[2:5, 1:5] = True
    rle = coco_mask.encode(np.asfortranarray(box.numpy(), dtype=np.uint8))
    segmentations = [
        square(1, 2, 4, 3),
        [*square(1, 2, 4, 2), *square(1, 4, 4, 1), [1, 1, 2, 2]],
        {"size": [9, 13], "counts": [11, 3, 6, 3, 6, 3, 6, 3, 76]},
        {"size": [9, 13], "counts": rle["counts"].decode()},
    ]
    objects = [
        {"id": i, "image_id": 5, "category_id": 3, "bbox": [1, 2, 4, 3], "segmentation": value}
        for i, value in enumerate(segmentations)
    ]
    degenerate = objects[0] | {"bbox": [1, 2, 0, 3]}
    path = write_annotations(data(annotations=[degenerate, *objects]))
    masks = CocoImages(pictures, path, with_masks=True)[1][1]["masks"]
    assert masks.dtype == torch.bool
    assert torch.equal(masks, box.expand(4, 9, 13))
    assert CocoImages(pictures, path, with_masks=True)[0][1]["masks"].shape == (0, 9, 13)


def test_missing_area_and_id_are_filled_in(pictures: Path, write_annotations: Write) -> None:
    bare = [dict(entry) for entry in ANNOTATIONS]
    without_image = {"image_id": 77, "category_id": 3, "bbox": [0, 0, 1, 1]}
    dataset = CocoImages(pictures, write_annotations(data(annotations=[*bare, without_image])))
    assert dataset[1][1]["area"].tolist() == [12, 28]
    assert len(dataset.coco.anns) == 5


def test_pycocotools_reads_the_file_without_output(
    pictures: Path, write_annotations: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = CocoImages(pictures, write_annotations(data()))
    assert sorted(dataset.coco.imgs) == sorted(FILES)
    assert sorted(dataset.coco.cats) == [3, 7, 40]
    assert [entry["iscrowd"] for entry in dataset.coco.dataset["annotations"]] == [0, 0, 0, 1]
    assert capsys.readouterr().out == ""
    assert dataset.coco is dataset.coco
    # The object is not sent to workers.
    assert "coco" not in pickle.loads(pickle.dumps(dataset)).__dict__


@pytest.mark.parametrize("packed", ["no_folder", "folder_of_its_name", "other_folder", "deflated"])
def test_folder_and_zip_give_the_same_samples(
    packed: str,
    pictures: Path,
    write_annotations: Write,
    png: Png,
    write_zip: Write,
    tmp_path: Path,
) -> None:
    prefix = {"folder_of_its_name": "pictures/", "other_folder": "any/"}.get(packed, "")
    files = {prefix + name: png(key) for key, name in FILES.items()}
    files["__MACOSX/._a.png"] = b"not an image"
    path = write_zip(tmp_path / "pictures.zip", files, 8 * (packed == "deflated"))
    transforms = build_coco_transforms("train", image_size=24)
    options = {"transforms": transforms, "with_masks": True}
    folder, archive = (
        CocoImages(p, write_annotations(data()), **options) for p in (pictures, path)
    )
    for i in range(4):
        one, other = SeededDataset(folder)[(i, 3)], SeededDataset(archive)[(i, 3)]
        assert torch.equal(one[0], other[0])
        assert_same(one[1], other[1])


def test_a_folder_with_the_images_one_level_down_is_found(
    png: Png, write_annotations: Write, write_folder: Write, tmp_path: Path
) -> None:
    files = {f"pictures/{name}": png(key) for key, name in FILES.items()}
    dataset = CocoImages(write_folder(tmp_path / "pictures", files), write_annotations(data()))
    assert dataset[3][0].size == (13, 9)


def test_folder_or_zip_is_found_for_each_split(
    coco_path: Path, caplog: pytest.LogCaptureFixture, write_zip: Write
) -> None:
    with caplog.at_level(logging.INFO):
        train, val = (build_coco(split, coco_path) for split in ("train", "val"))
    assert np.array_equal(train[0][0], val[0][0])
    assert f"train: images from {coco_path / 'train2017'}" in caplog.text
    assert f"val: images from {coco_path / 'val2017.zip'}" in caplog.text
    # An empty folder is ignored.
    (coco_path / "val2017").mkdir()
    assert len(build_coco("val", coco_path)) == 4
    write_zip(coco_path / "train2017.zip", {"wrong": b""})
    caplog.clear()
    with caplog.at_level(logging.INFO):
        build_coco("train", coco_path)
    assert "both" in caplog.text
    assert "train2017.zip exist: the folder is used" in caplog.text


def test_images_and_annotations_can_have_any_path(
    coco_path: Path, pictures: Path, write_annotations: Write
) -> None:
    own = build_coco("train", images=pictures, annotations=write_annotations(data()))
    assert len(own) == 4
    mixed = build_coco("val", coco_path, images=pictures)
    assert mixed[0][0].size == (13, 9)


def test_a_corrupt_image_is_replaced_with_its_target(
    pictures: Path, write_annotations: Write
) -> None:
    (pictures / "a.png").write_bytes(b"text")
    dataset = CocoImages(
        pictures, write_annotations(data()), transforms=build_coco_transforms("val")
    )
    with pytest.raises(CorruptImageError, match=r"pictures: a\.png"):
        dataset[1]
    resilient = SeededDataset(ResilientDataset(dataset))
    assert resilient[(1, 0)][1]["image_id"].tolist() == [8]
    assert resilient.classes == ["dog", "cat", "cow"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_has_the_same_batches_for_any_number_of_workers(
    workers: int, coco_path: Path
) -> None:
    transforms = build_coco_transforms("train", image_size=16)
    dataset = SeededDataset(ResilientDataset(build_coco("val", coco_path, transforms=transforms)))
    sampler = DistributedShuffleSampler(len(dataset), seed=1)
    loader = torch.utils.data.DataLoader(
        dataset, sampler=sampler, batch_size=3, num_workers=workers, collate_fn=collate
    )
    pairs = list(sampler)
    batches = list(loader)
    assert [len(targets) for _, _, targets in batches] == [3, 1]
    images, mask, targets = batches[0]
    for i, pair in enumerate(pairs[:3]):
        image, target = dataset[pair]
        height, width = image.shape[1:]
        assert torch.equal(images[i, :, :height, :width], image)
        assert (~mask[i]).sum() == height * width
        assert_same(targets[i], target)
