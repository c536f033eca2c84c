"""Tests of decoding for training: the pixels of Pillow, in less time."""

import io
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets import DataError, FolderImages, build_byte_transform, build_coco_transforms
from datasets.decoders import decode_pixels, find_decoder
from datasets.errors import CorruptImageError
from datasets.image_files import open_image
from datasets.images import decode_rgb
from tests.datasets.test_transforms import seed_all

needs_simplejpeg = pytest.mark.skipif(
    find_spec("simplejpeg") is None, reason="simplejpeg is not installed"
)


def photo(mode: str = "RGB") -> Image.Image:
    """Make a smooth image of odd size."""
    pixels = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((201, 133), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    """Return the content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@needs_simplejpeg
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(encoded(photo(), subsampling=0), id="444"),
        pytest.param(encoded(photo(), subsampling=1), id="422"),
        pytest.param(encoded(photo(), subsampling=2, quality=30), id="420"),
        pytest.param(encoded(photo(), progressive=True), id="progressive"),
        pytest.param(encoded(photo("L")), id="gray"),
    ],
)
def test_the_pixels_of_a_jpeg_file_are_those_of_pillow(content: bytes) -> None:
    pixels = decode_pixels(content, "x.jpg")
    assert isinstance(pixels, Tensor)
    assert pixels.permute(1, 2, 0).is_contiguous()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(decode_rgb(content, "x.jpg")))


@needs_simplejpeg
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(encoded(photo("CMYK")), id="CMYK"),
        pytest.param(encoded(photo(), "PNG"), id="png"),
        pytest.param(encoded(photo("P"), "GIF"), id="gif"),
    ],
)
def test_other_files_are_left_to_pillow(content: bytes) -> None:
    image = decode_pixels(content, "x")
    assert isinstance(image, Image.Image)
    assert np.array_equal(np.asarray(image), np.asarray(decode_rgb(content, "x")))


@needs_simplejpeg
@pytest.mark.parametrize("upright", [False, True])
def test_a_rotated_image_is_decoded_as_its_annotations(upright: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(photo(), exif=exif)
    annotated = (133, 201) if upright else (201, 133)
    decoded = decode_pixels(content, "x.jpg", annotated)
    expected = np.asarray(decode_rgb(content, "x.jpg", annotated))
    pixels = decoded.permute(1, 2, 0) if isinstance(decoded, Tensor) else decoded
    assert np.array_equal(np.asarray(pixels), expected)
    assert expected.shape[:2] == ((201, 133) if upright else (133, 201))


@needs_simplejpeg
@pytest.mark.parametrize("cut", [0, 3, 200, -300], ids=str)
def test_truncated_files_are_corrupt_as_before(cut: int) -> None:
    content = encoded(photo())[:cut]
    for decode in (decode_pixels, decode_rgb):
        with pytest.raises(CorruptImageError, match=r"corrupt image x\.jpg"):
            decode(content, "x.jpg")


@needs_simplejpeg
def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CorruptImageError, match="decompression bomb"):
        decode_pixels(encoded(photo()), "x.jpg")


@needs_simplejpeg
def test_only_transforms_to_bytes_for_training_use_simplejpeg() -> None:
    options = {"decoder": "simplejpeg"}
    assert build_byte_transform(True, **options).decode is decode_pixels
    assert build_coco_transforms("train", normalize=False, **options).decode is decode_pixels
    others = [
        build_byte_transform(False, **options),
        build_byte_transform(True, input_size=32, **options),
        build_byte_transform(True, augment="affine", **options),
        build_byte_transform(True, augment="none", **options),
        build_coco_transforms("train", **options),
        build_coco_transforms("val", normalize=False, **options),
    ]
    assert all(getattr(other, "decode", decode_rgb) is decode_rgb for other in others)


@needs_simplejpeg
def test_the_installed_decoder_is_used_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert find_decoder("auto") is decode_pixels
    assert caplog.messages == ["JPEG decoder: simplejpeg"]
    assert find_decoder("pillow") is decode_rgb


def test_a_missing_decoder_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert find_decoder("auto") is decode_rgb
    assert "pip install simplejpeg" in caplog.text
    with pytest.raises(DataError, match="pip install simplejpeg"):
        find_decoder("simplejpeg")


@needs_simplejpeg
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_training_sample_does_not_depend_on_the_decoder(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    photo().save(tmp_path / "a" / f"x.{suffix}")
    transform = build_byte_transform(True, input_size=64, decoder="simplejpeg")
    data = FolderImages(tmp_path, transform)
    image = decode_rgb(data.read(0), "x")
    for seed in range(10):
        seed_all(seed)
        (pixels, *draws), target = data[0]
        seed_all(seed)
        expected, *same = transform(image)
        assert torch.equal(pixels, expected)
        assert (draws, target) == (same, 0)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_gray_values_are_scaled_to_8_bits(form: str) -> None:
    values = np.array([[0, 255, 256, 25_700, 65_535]], dtype=np.uint16)
    image = decode_rgb(encoded(Image.fromarray(values), form), "x")
    assert np.asarray(image)[0].tolist() == [[v, v, v] for v in (0, 0, 1, 100, 255)]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[0, 0.5, 1]], dtype=np.float32), "floating-point numbers"),
        (np.array([[0, 1, 70_000]], dtype=np.int32), "32-bit integers"),
    ],
    ids=["float", "int32"],
)
def test_gray_values_without_a_range_are_refused(values: np.ndarray, kind: str) -> None:
    content = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(CorruptImageError, match=f"x.tif: its gray values are {kind}, save it with"):
        decode_rgb(content, "x.tif")
    with pytest.raises(ValueError, match=kind):
        open_image(Image.fromarray(values))
