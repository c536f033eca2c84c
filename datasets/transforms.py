"""Image transforms of the DeiT recipe, through timm.

Training: random resized crop, flip, RandAugment, random erasing. Evaluation: resize to 256/224 of
the input size, center crop. As in DeiT, inputs of at most 32 pixels (CIFAR, digits) are cropped
at random from a border of 4 pixels instead, and evaluated whole. What differs: small images of
another size are first resized to the input size, and rectangles are allowed everywhere.
"""

from collections.abc import Sequence
from typing import Literal

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

Augment = Literal["recipe", "affine", "none"]

_SMALL = 32
_POLICY = "rand-m9-mstd0.5-inc1"
_AUGMENTS = ("recipe", "affine", "none")
_INTERPOLATIONS = ("bicubic", "bilinear", "random")
_ERASING_MODES = ("pixel", "rand", "const")


def build_transform(
    is_train: bool,
    *,
    input_size: int | tuple[int, int] = 224,
    augment: Augment = "recipe",
    color_jitter: float = 0.4,
    aa: str | None = _POLICY,
    train_interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
) -> transforms.Compose:
    """Builds the transform from a PIL RGB image to a normalized float tensor (3, H, W).

    Args:
        is_train: The random transform for training, or the fixed one for evaluation.
        input_size: Side in pixels, or (height, width).
        augment: `recipe`, DeiT's; `affine`, for images that are resized whole, such as digits:
            a rotation of at most 12 degrees, 15 % of scale and a shift of 7.5 %, nothing else;
            `none`, the evaluation transform for training too. Pass it for evaluation as well:
            what is trained whole is evaluated whole.
        color_jitter: Strength; without effect where `aa` is given.
        aa: timm's name of a RandAugment or AutoAugment policy, or None.
        train_interpolation: `bicubic`, `bilinear` or `random` (one of both for each image).
        reprob: Probability of random erasing.
        remode: `pixel`, `rand` or `const` filling of what is erased.
        recount: Rectangles erased.

    Raises:
        ValueError: An argument is not one of the allowed values.
    """
    _check("augment", augment, _AUGMENTS)
    _check("train_interpolation", train_interpolation, _INTERPOLATIONS)
    _check("remode", remode, _ERASING_MODES)
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"input_size must be a side or (height, width) > 0, not {input_size}")

    whole = augment == "affine" or max(size) <= _SMALL
    if not is_train or augment == "none":
        return _evaluation(size, whole)
    if augment == "affine":
        return _affine(size)
    try:
        recipe = create_transform(
            input_size=size,
            is_training=True,
            color_jitter=color_jitter,
            auto_augment=aa,
            interpolation=train_interpolation,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, ValueError) as error:
        # timm asserts what it knows of a policy's name.
        raise ValueError(f"timm refuses aa {aa!r}, color_jitter {color_jitter}: {error}") from error
    _allow_zero_bits(recipe)
    if whole:
        crop = [_resize(size), transforms.RandomCrop(size, padding=4)]
        recipe = transforms.Compose(crop + recipe.transforms[1:])
    return recipe


def _allow_zero_bits(recipe: transforms.Compose) -> None:
    """Lets timm's posterize keep no bits, which gives a black image, under every Pillow.

    At the end of its range the recipe asks for that, and Pillow 13 refuses it.
    """
    for step in recipe.transforms:
        for op in getattr(step, "ops", []):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, min(bits, 8))


def _evaluation(size: tuple[int, int], whole: bool) -> transforms.Compose:
    if whole:
        return transforms.Compose([_resize(size), *_to_tensor()])
    return create_transform(
        input_size=size, is_training=False, interpolation="bicubic", crop_pct=224 / 256
    )


def _affine(size: tuple[int, int]) -> transforms.Compose:
    affine = transforms.RandomAffine(
        degrees=12,
        translate=(0.075, 0.075),
        scale=(0.85, 1.15),
        interpolation=InterpolationMode.BILINEAR,
    )
    return transforms.Compose([_resize(size), affine, *_to_tensor()])


def _resize(size: tuple[int, int]) -> transforms.Resize:
    return transforms.Resize(size, interpolation=InterpolationMode.BICUBIC)


def _to_tensor() -> list[object]:
    return [
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ]


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
