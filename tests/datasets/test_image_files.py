"""Images are found in files, folders, patterns, archives and at URLs, and turned upright."""

import io
import os
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import CorruptImageError, DataError
from datasets.image_files import ImageFiles, find_images, open_image, read_image
from tests.web_server import serve


def encoded(color: str = "red", kind: str = "PNG", **options) -> bytes:
    """Return an image of 3 x 2 pixels as a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), color).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with images, other files, and archives of the images."""
    folder = tmp_path / "photos"
    names = ["b.png", "a.JPG", "sub/c.png", "sub/Grüße 写真.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded())
    (folder / "notes.txt").write_text("no image")
    (folder / "._b.png").write_text("hidden")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in names:
            archive.write(folder / name, name)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name in names:
            archive.add(folder / name, name)
    return folder


ALL = {"a.JPG", "b.png", "sub/c.png", "sub/Grüße 写真.png"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("photos", ALL),
        ("z.zip", ALL),
        ("t.tar", ALL),
        ("photos/b.png", {"b.png"}),
        ("photos/*.png", {"b.png"}),
        ("photos/**/*.png", {"b.png", "c.png", "Grüße 写真.png"}),
        ("photos/sub/Grüße 写真.png", {"Grüße 写真.png"}),
        ("z.zip/sub", {"sub/c.png", "sub/Grüße 写真.png"}),
        ("z.zip/sub/c.png", {"c.png"}),
        ("t.tar/b.png", {"b.png"}),
    ],
)
def test_images_are_found_and_read(source, found, photos, tmp_path):
    files = find_images([str(tmp_path / source)])
    assert {file.short_name for file in files} == found
    assert all(read_image(file.name).size == (3, 2) for file in files)


def test_an_image_given_twice_is_used_once(photos):
    files = find_images([str(photos / "b.png"), str(photos), str(photos / "*.png")])
    assert [file.short_name for file in files][:2] == ["b.png", "a.JPG"]
    assert {file.short_name for file in files} == ALL
    assert len(files) == len(ALL)


@pytest.mark.parametrize(
    "source", ["none.png", "photos/none", "z.zip/none.png", "photos/*.gif", "empty", "no.zip"]
)
def test_a_word_without_images_is_named(source, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"no image found in .*{re.escape(source)}: expected"):
        find_images([str(photos / "b.png"), str(tmp_path / source)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation, tmp_path):
    # The upright image has a red top left corner and is 40 wide and 20 high.
    upright = Image.new("RGB", (40, 20), "blue")
    upright.paste("red", (0, 0, 16, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "a.webp"):
        stored.save(tmp_path / name, exif=exif, **({"quality": 95} if name != "a.png" else {}))
        for image in (read_image(str(tmp_path / name)), open_image(Image.open(tmp_path / name))):
            assert image.size == (40, 20)
            red, _, blue = image.getpixel((4, 4))
            assert red > 180 > 80 > blue, name


def test_damaged_exif_data_is_ignored(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(kind="JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff"))
    assert read_image(str(tmp_path / "a.jpg")).size == (3, 2)


def large_png(side: int) -> bytes:
    """Return the start of a PNG of the given side, which is enough to read its size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        content = name + data
        return struct.pack(">I", len(data)) + content + struct.pack(">I", zlib.crc32(content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "unknown image format"),
        (b"<!DOCTYPE html><html>", "must be an image, got a web page"),
        (encoded()[:40], "corrupt image"),
        (large_png(50_000), r"too large: Image size \(2500000000 pixels\) exceeds limit"),
    ],
    ids=["empty", "html", "truncated", "large"],
)
def test_an_unreadable_image_is_an_item_and_does_not_stop(content, words, tmp_path):
    (tmp_path / "bad.png").write_bytes(content)
    (tmp_path / "good.png").write_bytes(encoded())
    names = [str(tmp_path / name) for name in ("bad.png", "good.png")]
    error, size = ImageFiles(names, lambda image: image.size)
    assert size == (3, 2)
    assert isinstance(error, CorruptImageError)
    with pytest.raises(CorruptImageError, match=words) as caught:
        raise error
    assert "bad.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_urls_are_downloaded_and_their_errors_named():
    with serve(photo=encoded(), page=b"<html>sign in</html>") as site:
        (file,) = find_images([site.url("photo.pth")])
        assert file.short_name == "photo.pth"
        assert read_image(file.name).size == (3, 2)
        with pytest.raises(CorruptImageError, match="the server answered 404 Not Found"):
            read_image(site.url("none.jpg"))
        with pytest.raises(CorruptImageError, match="got a web page"):
            read_image(site.url("page.pth"))
        site.break_after = [10]
        with pytest.raises(
            CorruptImageError, match=r"cannot download .*photo.*broke off at 10 bytes"
        ):
            read_image(site.url("photo.pth"))
    with pytest.raises(CorruptImageError, match=r"cannot download http://127\.0\.0\.1:1/a\.jpg"):
        read_image("http://127.0.0.1:1/a.jpg")


def test_arrays_and_pil_images_are_images():
    array = np.zeros((2, 3, 3), np.uint8)
    assert open_image(array).size == open_image(array[..., 0]).size == (3, 2)
    assert open_image(Image.new("RGBA", (3, 2))).mode == "RGB"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((2, 3, 3)), r"float64 array of shape \(2, 3, 3\)"),
        (np.zeros((3, 2, 2), np.uint8), r"uint8 array of shape \(3, 2, 2\)"),
        (7, "got int"),
    ],
)
def test_other_objects_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        open_image(wrong)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_no_image(kind, tmp_path):
    path = tmp_path / "photo.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CorruptImageError, match=r"photo\.png: it is not a regular file"):
        read_image(str(path))
