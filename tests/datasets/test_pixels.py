"""Tests of images as bytes: exact normalization, erasing on the batch, equal augmentation."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing

from datasets import (
    build_byte_transform,
    build_coco_transforms,
    build_transform,
    collate,
    collate_augmented,
    collate_pixels,
    erase,
    normalize_batch,
    normalize_pixels,
)
from datasets.coco_transforms import normalize_image
from datasets.pixels import DrawErasing, to_image, to_uint8
from tests.datasets.test_coco_transforms import made_target
from tests.datasets.test_transforms import made_image, seed_all

STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Make an image of noise, with all 256 levels if it is large enough."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(seed: int) -> Image.Image:
    """Make a photo-like image."""
    return noise(25, 19, seed).resize((250, 190), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [224, 32, (40, 72)], ids=str)
@pytest.mark.parametrize("augment", ["recipe", "affine"])
def test_evaluation_from_bytes_is_equal_to_the_last_bit(
    size: int | tuple[int, int], augment: str
) -> None:
    options = {"input_size": size, "augment": augment}
    images = [made_image(64, 48), noise(320, 200), noise(30, 90)]
    expected = torch.stack([build_transform(False, **options)(image) for image in images])
    transform = build_byte_transform(False, **options)
    batch, targets = collate_pixels([(transform(image), i) for i, image in enumerate(images)])
    assert batch.dtype == torch.uint8
    assert torch.equal(targets, torch.arange(3))
    normalized = normalize_pixels(batch)
    assert torch.equal(normalized, expected)
    # The strides select the kernels of a model, and so the last bits of its outputs.
    assert normalized.stride() == expected.stride()
    assert normalize_pixels(normalized) is normalized


def test_the_two_versions_of_torchvision_scale_differently() -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    exact = normalize_image(Image.fromarray(levels[0].permute(1, 2, 0).contiguous().numpy()))
    assert torch.equal(normalize_pixels(levels, reciprocal=True)[0], exact)
    assert not torch.equal(normalize_pixels(levels)[0], exact)


@pytest.mark.parametrize("image_size", [64, 800], ids=str)
def test_detection_from_bytes_is_equal_to_the_last_bit(image_size: int) -> None:
    samples = [(noise(640, 480), made_target(640, 480)), (noise(90, 120), made_target(90, 120))]
    batches = [
        collate(
            [build_coco_transforms("val", image_size=image_size, normalize=n)(*s) for s in samples]
        )
        for n in (True, False)
    ]
    (expected, mask, targets), (pixels, same_mask, same_targets) = batches
    assert pixels.dtype == torch.uint8
    assert torch.equal(mask, same_mask)
    assert mask.any()
    for target, same in zip(targets, same_targets, strict=True):
        assert all(torch.equal(target[name], same[name]) for name in target)
    normalized = normalize_batch(pixels, mask)
    assert torch.equal(normalized, expected)
    assert normalized.stride() == expected.stride()
    assert normalize_batch(expected, mask) is expected


def test_detection_augments_bytes_as_floats() -> None:
    transforms = [build_coco_transforms("train", image_size=96, normalize=n) for n in (True, False)]
    for seed in range(12):
        drawn = []
        for transform in transforms:
            random.seed(seed)
            drawn.append(transform(smooth(seed).resize((640, 480)), made_target(640, 480)))
        (image, target), (pixels, same) = drawn
        assert all(torch.equal(target[name], same[name]) for name in target)
        floats = normalize_pixels(pixels[None], reciprocal=True)[0]
        # A crop is resized twice, so that a rounding of the first resize changes the second.
        assert ((image - floats) * STD * 255).abs().max() <= 2.01


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_classification_augments_bytes_as_floats(interpolation: str) -> None:
    # Without a policy, whose operations may amplify a difference of one level.
    options = {"aa": None, "color_jitter": 0, "train_interpolation": interpolation, "reprob": 0}
    image = smooth(1)
    for seed in range(12):
        seed_all(seed)
        expected = build_transform(True, **options)(image)
        seed_all(seed)
        pixels, *draws = build_byte_transform(True, **options)(image)
        assert draws == [[], []]
        difference = ((normalize_pixels(pixels[None])[0] - expected) * STD * 255).abs()
        assert difference.max() <= 2.01
        assert difference.mean() < 0.1


@pytest.mark.parametrize("options", [{}, {"augment": "affine"}, {"input_size": 32}], ids=str)
def test_the_policies_draw_the_same_operations(options: dict[str, object]) -> None:
    image, far = smooth(2), 0
    for seed in range(20):
        seed_all(seed)
        expected = build_transform(True, reprob=0, **options)(image)
        seed_all(seed)
        pixels, *_ = build_byte_transform(True, reprob=0, **options)(image)
        difference = (normalize_pixels(pixels[None])[0] - expected) * STD * 255
        far += difference.abs().mean() > 1
    # Equalization and posterization may amplify a difference of one level.
    assert far <= 1


@pytest.mark.parametrize("count", [1, 3])
def test_the_rectangles_are_those_of_timm(count: int) -> None:
    theirs = RandomErasing(0.6, mode="const", max_count=count, device="cpu")
    ours = DrawErasing(0.6, count)
    erased = 0
    for seed in range(60):
        random.seed(seed)
        expected = theirs(torch.ones(3, 40, 56))
        random.seed(seed)
        rectangles = ours(40, 56)
        assert torch.equal(erase(torch.ones(1, 3, 40, 56), [rectangles], "const")[0], expected)
        erased += bool(rectangles)
    assert 20 < erased < 50


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_depends_only_on_the_sample(mode: str) -> None:
    images = torch.full((3, 3, 20, 30), 5.0)
    erasings = [[(2, 3, 10, 20, 7)], [], [(0, 0, 4, 5, 8), (10, 20, 10, 10, 9)]]
    batch = erase(images.clone(), erasings, mode)
    state = torch.get_rng_state()
    alone = [erase(images[i : i + 1].clone(), erasings[i : i + 1], mode)[0] for i in (2, 1, 0)]
    assert torch.equal(torch.stack(alone[::-1]), batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch[1], images[1])
    inside = batch[0, :, 2:12, 3:23]
    assert (batch[0] != 5).sum() == inside.numel()
    if mode == "const":
        assert not inside.any()
    elif mode == "rand":
        assert (inside == inside[:, :1, :1]).all()
        assert len(set(inside[:, 0, 0].tolist())) == 3
    else:
        assert abs(inside.mean()) < 0.2
        assert abs(inside.std() - 1) < 0.1


def test_a_training_batch_has_the_rectangles_of_each_image() -> None:
    transform = build_byte_transform(True, input_size=40, reprob=0.5)
    seed_all(0)
    samples = [(transform(made_image(80, 60)), i) for i in range(8)]
    images, targets, erasings, operations = collate_augmented(samples)
    assert (images.shape, images.dtype) == ((8, 3, 40, 40), torch.uint8)
    assert targets.tolist() == list(range(8))
    assert [len(rectangles) for rectangles in erasings] == [len(s[1]) for s, _ in samples]
    assert 0 < sum(map(len, erasings)) < 8
    assert operations == [[]] * 8


def test_bytes_and_images_convert_without_change() -> None:
    image = made_image(13, 9)
    pixels = to_uint8(image)
    assert pixels.shape == (3, 9, 13)
    assert np.array_equal(np.asarray(image), np.asarray(to_image(pixels)))


@pytest.mark.parametrize(
    "name", ["shear_x", "shear_y", "translate_x_rel", "translate_y_rel"], ids=str
)
def test_faster_operations_equal_those_of_timm(name: str) -> None:
    original = getattr(auto_augment, name)
    (step,) = (s for s in build_byte_transform(True).transforms if hasattr(s, "ops"))
    functions = [op.aug_fn for op in step.ops]
    (faster,) = (f for f in functions if getattr(f, "keywords", {}).get("original") is original)
    options = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BICUBIC}
    for image in (noise(90, 70), smooth(3), Image.new("RGB", (1, 5))):
        for level in (-0.45, -0.2, 0.0, 0.1337, 0.3):
            expected = np.asarray(original(image, level, **options)).astype(int)
            difference = np.abs(np.asarray(faster(image, level, **options)) - expected)
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.01
    options["resample"] = Image.Resampling.BILINEAR
    drawn = [np.asarray(f(smooth(3), 0.2, **options)) for f in (original, faster)]
    assert np.array_equal(*drawn)
    assert original in auto_augment.NAME_TO_OP.values()
