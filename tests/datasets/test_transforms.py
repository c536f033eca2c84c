"""Tests of `build_transform`: recorded evaluation, rectangles, small images, affine transform."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from datasets import build_transform

GOLDEN = Path(__file__).parents[1] / "golden" / "deit_train.npz"
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def made_image(width: int, height: int) -> Image.Image:
    """Make the image that the recorded values were computed from."""
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((3 * x + 5 * y + 70 * c + x * y // 7) % 256).astype(np.uint8))


def gray(width: int, height: int) -> Image.Image:
    """Make a plain gray image."""
    return Image.new("RGB", (width, height), (128, 128, 128))


def seed_all(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def kinds(transform: transforms.Compose) -> list[str]:
    """Return the class names of the steps of a transform."""
    return [type(step).__name__ for step in transform.transforms]


def test_evaluation_equals_the_recorded_values() -> None:
    image = build_transform(False, input_size=224)(made_image(640, 480))
    with np.load(GOLDEN) as golden:
        expected = torch.from_numpy(golden["eval_tf/640x480_224/sample"])
    flat = image.reshape(-1)
    sample = flat[torch.arange(64) * (flat.numel() // 64)]
    torch.testing.assert_close(sample, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("augment", ["recipe", "affine", "none"])
@pytest.mark.parametrize("is_train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "size", [224, 40, 24, (224, 336), (24, 33), (17, 29)], ids=lambda size: f"{size}"
)
def test_every_transform_returns_the_input_size(
    size: int | tuple[int, int], is_train: bool, augment: str
) -> None:
    transform = build_transform(is_train, input_size=size, augment=augment)
    height, width = (size, size) if isinstance(size, int) else size
    for image in (made_image(63, 45), made_image(8, 8), made_image(50, 300)):
        tensor = transform(image)
        assert tensor.shape == (3, height, width)
        assert tensor.dtype == torch.float32


def test_evaluation_of_a_rectangle_keeps_the_aspect_ratio() -> None:
    # A disk in a 4 : 3 image must still be as wide as high after the crop to 1 : 2.
    y, x = np.mgrid[:480, :640]
    disk = ((x - 319.5) ** 2 + (y - 239.5) ** 2 < 60**2) * np.uint8(255)
    image = build_transform(False, input_size=(112, 224))(Image.fromarray(disk).convert("RGB"))
    ink = (image * STD + MEAN)[0] > 0.5
    assert ink.any(dim=0).sum() == ink.any(dim=1).sum() == round(120 * 256 / 640)


def test_training_follows_the_recipe() -> None:
    transform = build_transform(True)
    assert kinds(transform) == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    erasing = transform.transforms[-1]
    assert (erasing.probability, erasing.rand_color, erasing.per_pixel) == (0.25, False, True)
    assert erasing.max_count == 1
    assert transform.transforms[0].interpolation == transforms.InterpolationMode.BICUBIC


def test_posterize_with_0_bits_gives_a_black_image() -> None:
    ops = {
        op.name: op for step in build_transform(True).transforms for op in getattr(step, "ops", [])
    }
    posterize = ops["PosterizeIncreasing"]
    posterize.prob, posterize.magnitude, posterize.magnitude_std = 1.0, 10, 0
    assert not np.asarray(posterize(gray(8, 8))).any()


def test_color_jitter_replaces_a_missing_policy_and_erasing_can_be_off() -> None:
    names = kinds(build_transform(True, aa=None, reprob=0))
    assert "ColorJitter" in names
    assert "RandAugment" not in names
    assert "RandomErasing" not in names


def test_small_images_are_cropped_with_a_padding_of_four_pixels() -> None:
    transform = build_transform(True, input_size=32, aa=None, color_jitter=0, reprob=0)
    assert kinds(transform)[:3] == ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    image = made_image(32, 32)
    whole = build_transform(False, input_size=32)(image)
    padded = torch.nn.functional.pad(whole * STD + MEAN, (4, 4, 4, 4))
    crops = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    seed_all(0)
    for _ in range(5):
        drawn = transform(image) * STD + MEAN
        matches = [torch.allclose(drawn, c, atol=1e-5) for c in crops]
        matches += [torch.allclose(drawn.flip(-1), c, atol=1e-5) for c in crops]
        assert any(matches)


@pytest.mark.parametrize("augment", ["recipe", "affine"])
def test_evaluation_does_not_crop_small_images_and_those_of_affine(augment: str) -> None:
    size = 24 if augment == "recipe" else 48
    image = made_image(8, 8)
    expected = transforms.functional.to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))
    drawn = build_transform(False, input_size=size, augment=augment)(image)
    torch.testing.assert_close(drawn * STD + MEAN, expected)


def test_affine_moves_the_image_and_keeps_its_colors() -> None:
    transform = build_transform(True, input_size=32, augment="affine")
    assert kinds(transform) == ["Resize", "RandomAffine", "ToTensor", "Normalize"]
    seed_all(0)
    first, second = transform(made_image(8, 8)), transform(made_image(8, 8))
    assert not torch.equal(first, second)
    # Away from the border, the color of a plain image does not change.
    inside = (transform(gray(8, 8)) * STD + MEAN)[:, 12:20, 12:20]
    torch.testing.assert_close(inside, torch.full_like(inside, 128 / 255))


@pytest.mark.parametrize("size", [24, 224])
def test_no_augmentation_is_the_evaluation_transform(size: int) -> None:
    image = made_image(100, 80)
    train = build_transform(True, input_size=size, augment="none")(image)
    assert torch.equal(train, build_transform(False, input_size=size)(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "weak"}, "augment must be one of recipe, affine, none, got 'weak'"),
        ({"train_interpolation": "cubic"}, "train_interpolation must be one of .*'cubic'"),
        ({"remode": "noise"}, "remode must be one of pixel, rand, const, got 'noise'"),
        ({"aa": "strong"}, "aa .*got aa 'strong'"),
        ({"aa": "rand-z9"}, "aa .*got aa 'rand-z9'"),
        ({"input_size": 0}, "input_size .*0"),
        ({"input_size": (3, 224, 224)}, "input_size .*224"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_an_invalid_argument_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_transform(True, **options)
