"""RandAugment on the device: the operations of timm, from the same random numbers."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from datasets import build_byte_transform, normalize_pixels
from datasets.device_augment import apply_operations, draw_operations, record_operations
from datasets.pixels import collate_augmented, to_uint8
from datasets.transforms import allow_zero_bits, build_transform
from engine import seed_all
from scripts.benchmark.host_syncs import OperatorCounter

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def photo(seed: int, width: int = 61, height: int = 47) -> Image.Image:
    """Draw a noisy image without black and white."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), BICUBIC)).astype(int)
    noisy = pixels * 0.8 + 20 + draw.integers(-9, 10, pixels.shape)
    return Image.fromarray(noisy.astype(np.uint8))


def policy(name: str = "rand-m9-mstd0.5-inc1", interpolation: object = BICUBIC):
    """Build timm's policy as `create_transform` does."""
    options = {"translate_const": 20, "img_mean": (124, 116, 104), "interpolation": interpolation}
    built = rand_augment_transform(name, options)
    # A transform with the step that `build_transform` fixes.
    holder = build_transform(True, aa=None)
    holder.transforms = [built]
    allow_zero_bits(holder)
    return built


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m5-mstd1"])
@pytest.mark.parametrize("interpolation", [BICUBIC, BILINEAR, (BICUBIC, BILINEAR)], ids=str)
def test_each_operation_has_the_pixels_of_timm(name, interpolation):
    theirs, ours = policy(name, interpolation), policy(name, interpolation)
    record_operations(ours)
    ours.num_layers, ops = 1, list(ours.ops)
    assert len(ops) == 15
    for expected_op, op in zip(theirs.ops, ops, strict=True):
        ours.ops, changed = [op], 0
        for seed in range(8):
            image = photo(seed)
            random.seed(seed)
            expected = to_uint8(expected_op(image)).int()
            state = random.getstate()
            random.seed(seed)
            drawn = draw_operations(ours, image.height, image.width)
            assert random.getstate() == state
            result = apply_operations(to_uint8(image)[None], [drawn])[0].int()
            difference = (result - expected).abs()
            if op.name in AFFINE:
                assert difference.max() <= 1
                assert (difference > 0).float().mean() < 0.005
            else:
                assert not difference.any(), op.name
            changed += bool((result != to_uint8(image)).any())
        assert changed > 0, op.name


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_a_batch_has_the_augmentation_of_the_workers(interpolation):
    options = {"input_size": 48, "train_interpolation": interpolation}
    batches = []
    for augment_on in ("cpu", "device"):
        transform = build_byte_transform(True, augment_on=augment_on, **options)
        samples = []
        for seed in range(24):
            seed_all(seed)
            samples.append((transform(photo(seed, 80, 70)), seed))
        batches.append(collate_augmented(samples))
    (expected, _, erasings, none), (images, _, same, operations) = batches
    assert same == erasings
    assert any(erasings)
    assert none == [[]] * 24
    assert {len(drawn) for drawn in operations} == {0, 1, 2}
    assert not torch.equal(images, expected)
    alone = [apply_operations(images[i : i + 1].clone(), operations[i : i + 1]) for i in range(24)]
    with OperatorCounter() as counter:
        result = apply_operations(images, operations)
    assert counter.done().syncs == 0
    assert result is images
    assert torch.equal(torch.cat(alone), result)
    difference = (result.int() - expected.int()).abs().float().mean((1, 2, 3))
    # Equalization and posterization may amplify a difference of one level.
    assert (difference < 0.05).sum() >= 21
    assert difference.max() < 3
    assert normalize_pixels(result).isfinite().all()


def test_a_batch_without_operations_stays_as_it_is():
    images = to_uint8(photo(0))[None].clone()
    assert torch.equal(apply_operations(images.clone(), [[]]), images)


def test_a_transform_without_a_policy_draws_no_operations():
    for options in ({"aa": None}, {"augment": "affine"}, {"augment": "none"}):
        transform = build_byte_transform(True, input_size=40, augment_on="device", **options)
        result = transform(photo(0))
        assert isinstance(result, torch.Tensor) or result[2] == []


@pytest.mark.parametrize("aa", ["original", "augmix-m3", "rand-m5-t3a"])
def test_policies_that_the_device_does_not_have_are_refused(aa):
    with pytest.raises(ValueError, match=r"augment_on must be cpu for .*, got "):
        build_byte_transform(True, input_size=48, aa=aa, augment_on="device")
