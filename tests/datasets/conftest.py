"""Small sets of images in folders, tars and zips."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.datasets.coco_files import FILES, data


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the user's cache by an empty folder in every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def _png(seed: int) -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (9, 13, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_tar(path: Path, files: dict[str, bytes], **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """A function that encodes 13 x 9 pixels of noise as a PNG; equal seeds give equal images."""
    return _png


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """A function that writes {name: content} as a tar."""
    return _write_tar


@pytest.fixture(scope="session")
def write_zip() -> Callable[..., Path]:
    """A function that writes {name: content} as a zip."""
    return _write_zip


@pytest.fixture
def write_folder() -> Callable[..., Path]:
    """A function that writes {name: content} as files in a folder."""
    return _write_folder


@pytest.fixture
def tree() -> dict[str, bytes]:
    """Seven images of three classes as {name: content}, not sorted."""
    names = ("b/2.png", "b/10.png", "a/x.png", "c-d/1.png", "c-d/0.png", "a/y.png", "a/w.png")
    return {name: _png(seed) for seed, name in enumerate(names)}


@pytest.fixture
def write_annotations(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an annotation file."""

    def write(content: dict[str, Any]) -> Path:
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def pictures(
    png: Callable[[int], bytes], tmp_path: Path, write_folder: Callable[..., Path]
) -> Path:
    """A folder with the images of `coco_files`."""
    return write_folder(tmp_path / "pictures", {name: png(key) for key, name in FILES.items()})


@pytest.fixture
def coco_path(
    png: Callable[[int], bytes],
    tmp_path: Path,
    write_zip: Callable[..., Path],
    write_folder: Callable[..., Path],
) -> Path:
    """A data set in COCO's layout: training images in a folder, validation images in a zip."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(data()))
    files = {name: png(key) for key, name in FILES.items()}
    write_folder(root / "train2017", files)
    write_zip(root / "val2017.zip", {f"val2017/{name}": files[name] for name in files})
    return root
