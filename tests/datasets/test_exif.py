"""Images with EXIF rotation: boxes contain the pixels of their objects, however they were made."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader

from datasets import CocoImages, FolderImages
from tests.datasets.coco_files import square

Write = Callable[..., Path]

# Upright photographs are 60 pixels wide and 40 high, with a bright object in this box (x, y, w, h).
BOX = [32, 8, 20, 12]


def stored(orientation: int) -> bytes:
    """Return a JPEG as a phone stores it: pixels turned, and the orientation in EXIF."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    x, y, width, height = BOX
    pixels[y : y + height, x : x + width] = 255
    image = Image.fromarray(pixels)
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    if orientation in inverse:
        image = image.transpose(inverse[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def box_of_pixels(image: Image.Image) -> list[int]:
    """Return the box (x0, y0, x1, y1) of the bright pixels."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) > 128)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def open_photo(
    tmp_path: Path, write_annotations: Write, orientation: int, box: list[int], **size: Any
) -> CocoImages:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(stored(orientation))
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", **size}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": box,
                "segmentation": square(*box),
            }
        ],
    }
    masks = "width" in size
    return CocoImages(tmp_path / "photos", write_annotations(content), with_masks=masks)


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_annotations_of_the_upright_view_turn_the_image_upright(
    orientation: int, tmp_path: Path, write_annotations: Write
) -> None:
    dataset = open_photo(tmp_path, write_annotations, orientation, BOX, width=60, height=40)
    image, target = dataset[0]
    assert image.size == (60, 40)
    assert target["orig_size"].tolist() == [40, 60]
    x, y, width, height = BOX
    assert target["boxes"].tolist() == [[x, y, x + width, y + height]]
    assert box_of_pixels(image) == target["boxes"][0].tolist()
    assert target["masks"].shape == (1, 40, 60)
    assert np.array_equal(target["masks"][0], np.asarray(image.convert("L")) > 128)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_of_the_stored_pixels_leave_the_image_as_it_is(
    orientation: int, tmp_path: Path, write_annotations: Write
) -> None:
    with Image.open(io.BytesIO(stored(orientation))) as raw:
        x0, y0, x1, y1 = (int(value) for value in box_of_pixels(raw))
    box = [x0, y0, x1 - x0, y1 - y0]
    dataset = open_photo(tmp_path, write_annotations, orientation, box, width=40, height=60)
    image, target = dataset[0]
    assert image.size == (40, 60)
    assert box_of_pixels(image) == target["boxes"][0].tolist()


@pytest.mark.parametrize(
    ("orientation", "size"),
    [(6, {}), (6, {"width": 99, "height": 40}), (3, {"width": 60, "height": 40})],
    ids=["no_size", "other_size", "turned_by_180"],
)
def test_without_a_matching_size_the_pixels_are_used_as_stored(
    orientation: int, size: dict[str, int], tmp_path: Path, write_annotations: Write
) -> None:
    image, _ = open_photo(tmp_path, write_annotations, orientation, BOX, **size)[0]
    with Image.open(io.BytesIO(stored(orientation))) as raw:
        assert np.array_equal(image, raw.convert("RGB"))
        assert not np.array_equal(image, ImageOps.exif_transpose(raw).convert("RGB"))


def test_a_classifier_reads_the_pixels_as_stored(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(stored(6))
    image, _ = FolderImages(tmp_path)[0]
    assert image.size == (40, 60)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_another_size_than_annotated_are_counted(
    num_workers: int,
    tmp_path: Path,
    write_annotations: Write,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An image resized on disk would lose its boxes without a word."""
    (tmp_path / "photos").mkdir()
    sizes = {1: (60, 40), 2: (30, 20), 3: (60, 40), 4: (40, 60)}
    for number, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / "photos" / f"{number}.png")
    annotated = {"width": 60, "height": 40}
    content = {
        "images": [{"id": key, "file_name": f"{key}.png", **annotated} for key in sizes],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": BOX}],
    }
    dataset = CocoImages(tmp_path / "photos", write_annotations(content))
    dataset.warn_if_other_size()
    assert caplog.messages == []

    for _ in range(2):
        list(DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=len))
    dataset.warn_if_other_size()
    assert "2 images have another size than annotated" in caplog.messages[-1]
    if num_workers == 0:
        assert len(caplog.messages) == 2
        assert (
            "2.png: the image has 30 x 20 pixels and its annotations are for 60 x 40"
            in (caplog.messages[0])
        )
