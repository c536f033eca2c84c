"""Tests of DETR's transforms: recorded values, random training samples, batches."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_coco_transforms, collate
from datasets.coco_transforms import (
    crop,
    flip,
    normalize,
    resize,
    resize_short_side,
    short_side_size,
)
from tests.recipes import golden, golden_json

# Boxes of the recorded samples before the transforms. The area of an object is half of its box.
BOXES = [[10, 20, 200, 300], [400, 100, 639, 479], [300, 200, 340, 260], [600, 10, 638, 50]]
BOXES.append([0, 0, 30, 40])
LABELS = [1, 17, 44, 62, 90]


def made_image(width: int, height: int) -> Image.Image:
    """Make the image that the recorded values were computed from."""
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((3 * x + 5 * y + 70 * c + x * y // 7) % 256).astype(np.uint8))


def made_target(width: int, height: int) -> dict[str, torch.Tensor]:
    """Make the target before the transforms."""
    boxes = torch.tensor(BOXES, dtype=torch.float32)
    return {
        "boxes": boxes,
        "labels": torch.tensor(LABELS),
        "image_id": torch.tensor([42]),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) / 2,
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }


def masks_of(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Fill boxes (x0, y0, x1, y1), rounded to pixels."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def assert_recorded(image: torch.Tensor, target: dict[str, torch.Tensor], case: str) -> None:
    """Compare a sample with a recorded one."""
    arrays = golden("transforms")
    split, number = case.split("/")
    expected = golden_json("transforms")[split][number]
    assert list(image.shape) == expected["shape"]
    sample = image.flatten()[torch.from_numpy(arrays[f"{case}/sample_idx"])]
    torch.testing.assert_close(sample, torch.from_numpy(arrays[f"{case}/sample"]))
    means = image.mean(dim=(1, 2)).tolist()
    assert means == pytest.approx(expected["mean"], abs=1e-5)
    assert image.std(dim=(1, 2)).tolist() == pytest.approx(expected["std"], abs=1e-5)
    assert set(target) == set(expected["target"])
    for name, value in target.items():
        torch.testing.assert_close(value, torch.from_numpy(arrays[f"{case}/target/{name}"]))


@pytest.mark.parametrize(("width", "height"), [(640, 480), (1000, 300)])
def test_evaluation_equals_the_recorded_values(width: int, height: int) -> None:
    transform = build_coco_transforms("val")
    image, target = transform(made_image(width, height), made_target(width, height))
    assert_recorded(image, target, f"val/{width}x{height}")


@pytest.mark.parametrize("number", ["0", "1"])
def test_training_with_recorded_random_numbers_equals_the_recorded_values(number: str) -> None:
    draws = [draw[2] for draw in golden_json("transforms")["train"][number]["rng_calls"]]
    flipped, _, first, width, height, (top,), (left,), scale = draws
    sample = made_image(640, 480), made_target(640, 480)
    if flipped < 0.5:
        sample = flip(*sample)
    sample = resize_short_side(*sample, first)
    sample = crop(*sample, top, left, height, width)
    sample = resize_short_side(*sample, scale, 1333)
    assert_recorded(*normalize(*sample), f"train/{number}")


def test_sizes_equal_the_recorded_sizes() -> None:
    for image, cases in golden_json("transforms")["sizes"].items():
        width, height = map(int, image.split("x"))
        for case, expected in cases.items():
            size, _, bound = case.partition("_")
            bound = None if bound == "None" else int(bound)
            assert [*short_side_size(height, width, int(size), bound)] == expected, (image, case)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 5000), (5000, 1), (1, 1)], ids=["flat", "tall", "one_pixel"]
)
def test_an_extreme_aspect_ratio_keeps_at_least_one_pixel(height: int, width: int) -> None:
    assert min(short_side_size(height, width, 800, 1333)) >= 1


def test_training_samples_have_the_sizes_of_the_recipe() -> None:
    transform = build_coco_transforms("train")
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for seed in range(24):
        random.seed(seed)
        image, target = transform(made_image(160, 120), made_target(160, 120))
        height, width = image.shape[1:]
        assert target["size"].tolist() == [height, width]
        assert target["orig_size"].tolist() == [120, 160]
        assert min(height, width) in range(480, 801, 32) or max(height, width) == 1333
        whole = (height, width) == short_side_size(120, 160, min(height, width))
        seen[whole].add(min(height, width))
    # Half of the images are cropped, and the scales vary.
    assert min(len(seen[True]), len(seen[False])) >= 3


def test_a_training_sample_depends_on_the_seed() -> None:
    transform = build_coco_transforms("train", image_size=96)
    drawn = []
    for _ in range(2):
        random.seed(5)
        drawn.append(transform(made_image(640, 480), made_target(640, 480)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1]["boxes"], drawn[1][1]["boxes"])


def test_no_augmentation_is_the_evaluation_transform() -> None:
    sample = made_image(63, 45), made_target(63, 45)
    options = {"augment": "none", "image_size": 96}
    image, target = build_coco_transforms("train", **options)(*sample)
    other, same = build_coco_transforms("val", **options)(*sample)
    assert torch.equal(image, other)
    assert all(torch.equal(target[name], same[name]) for name in same)


def test_another_image_size_scales_the_whole_recipe() -> None:
    small = build_coco_transforms("train", image_size=96)
    assert (small.scales[0], small.scales[-1], small.max_size) == (58, 96, 160)
    assert small.crop_scales == (48, 60, 72)
    assert small.crop_sides == (46, 72)
    unchanged = build_coco_transforms("train", image_size=800)
    assert unchanged == build_coco_transforms("train")
    image, _ = build_coco_transforms("val", image_size=96)(made_image(96, 96), made_target(96, 96))
    assert image.shape == (3, 96, 96)


def test_resize_to_the_same_size_returns_the_image() -> None:
    image = made_image(45, 63)
    assert resize(image, made_target(45, 63), 63, 45)[0] is image


def test_flipping_twice_changes_nothing_and_crops_keep_the_pixels() -> None:
    sample = made_image(640, 480), made_target(640, 480)
    image, target = flip(*flip(*sample))
    assert np.array_equal(image, sample[0])
    assert torch.equal(target["boxes"], sample[1]["boxes"])
    assert np.array_equal(flip(*sample)[0], np.asarray(sample[0])[:, ::-1])
    image, target = crop(*sample, 150, 310, 100, 300)
    assert np.array_equal(image, np.asarray(sample[0])[150:250, 310:610])
    assert target["labels"].tolist() == [17, 44]
    assert target["boxes"].tolist() == [[90, 0, 300, 100], [0, 50, 30, 100]]
    assert target["area"].tolist() == [210 * 100, 30 * 50]


def test_the_transforms_do_not_change_the_target_in_place() -> None:
    target = made_target(640, 480)
    before = {name: value.clone() for name, value in target.items()}
    for seed in range(6):
        random.seed(seed)
        build_coco_transforms("train", image_size=64)(made_image(640, 480), target)
    assert all(torch.equal(target[name], value) for name, value in before.items())


def test_masks_are_transformed_with_their_boxes() -> None:
    sample = made_image(640, 480), made_target(640, 480)
    sample[1]["masks"] = masks_of(sample[1]["boxes"], 480, 640)
    for image, target in (
        flip(*sample),
        crop(*sample, 50, 100, 400, 500),
        resize(*sample, 960, 1280),
        crop(*flip(*resize(*sample, 960, 1280)), 20, 40, 700, 900),
    ):
        assert target["masks"].dtype == torch.bool
        assert len(target["masks"]) == len(target["labels"]) >= 3
        assert torch.equal(target["masks"], masks_of(target["boxes"], image.height, image.width))


def test_an_image_without_objects_is_transformed() -> None:
    target = {name: value[:0] for name, value in made_target(640, 480).items()}
    target["masks"] = torch.zeros(0, 480, 640, dtype=torch.bool)
    for seed in range(4):
        random.seed(seed)
        image, drawn = build_coco_transforms("train", image_size=64)(made_image(640, 480), target)
        assert drawn["boxes"].shape == (0, 4)
        assert drawn["masks"].shape == (0, *image.shape[1:])


def test_a_batch_is_padded_at_the_right_and_the_bottom() -> None:
    images = [torch.rand(3, 5, 9), torch.rand(3, 7, 4)]
    batch, mask, targets = collate([(images[0], {"a": 1}), (images[1], {})])
    assert batch.shape == (2, 3, 7, 9)
    assert mask.dtype == torch.bool
    for i, image in enumerate(images):
        height, width = image.shape[1:]
        assert torch.equal(batch[i, :, :height, :width], image)
        assert not mask[i, :height, :width].any()
        assert mask[i].sum() == 7 * 9 - height * width
        assert batch[i].masked_select(mask[i]).abs().sum() == 0
    assert targets == [{"a": 1}, {}]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split": "test"}, "split .*'test'"),
        ({"augment": "affine"}, "augment .*'affine'"),
        ({"image_size": 0}, "image_size .*0"),
        ({"eval_size": -1}, "eval_size .*-1"),
        ({"scales": ()}, "scales"),
        ({"max_size": 0}, "max_size .*0"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_an_invalid_argument_is_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_coco_transforms(**{"split": "train", **options})
