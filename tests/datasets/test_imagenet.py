"""Tests of class folders on disk and in tars: equal samples, clear errors for missing data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datasets import DataError, FolderImages, TarImages, build_imagenet

Write = Callable[..., Path]


@pytest.fixture(params=["folder", "tar"])
def open_images(
    request: pytest.FixtureRequest, write_tar: Write, write_folder: Write, tmp_path: Path
) -> Callable[..., FolderImages | TarImages]:
    """A function that writes {name: content} as a folder or a tar and opens it."""

    def open_written(files: dict[str, bytes], **options: object) -> FolderImages | TarImages:
        if request.param == "tar":
            return TarImages(write_tar(tmp_path / "train.tar", files), **options)
        return FolderImages(write_folder(tmp_path / "train", files), **options)

    return open_written


@pytest.mark.parametrize("prefix", ["", "./", "train/"], ids=["bare", "dot", "with_top_folder"])
def test_a_tar_has_the_samples_of_the_folder(
    prefix: str, tree: dict[str, bytes], write_tar: Write, write_folder: Write, tmp_path: Path
) -> None:
    folder = FolderImages(write_folder(tmp_path / "train", tree))
    tar = TarImages(write_tar(tmp_path / "train.tar", {prefix + name: tree[name] for name in tree}))
    top = prefix.removeprefix("./")
    assert tar.samples == [(top + name, target) for name, target in folder.samples]
    assert tar.classes == folder.classes == ["a", "b", "c-d"]
    for i in range(len(folder)):
        (left, left_target), (right, right_target) = folder[i], tar[i]
        assert left_target == right_target
        assert left.mode == right.mode == "RGB"
        assert np.array_equal(left, right)


def test_classes_are_parent_folders_in_sorted_order(
    open_images: Callable[..., FolderImages], tree: dict[str, bytes]
) -> None:
    images = open_images(tree)
    assert images.class_to_idx == {"a": 0, "b": 1, "c-d": 2}
    assert images.samples == [
        ("a/w.png", 0),
        ("a/x.png", 0),
        ("a/y.png", 0),
        ("b/10.png", 1),
        ("b/2.png", 1),
        ("c-d/0.png", 2),
        ("c-d/1.png", 2),
    ]
    assert images[3][1] == 1


def test_only_images_in_class_folders_are_samples(
    open_images: Callable[..., FolderImages], png: Callable[[int], bytes]
) -> None:
    images = open_images(
        {
            "a/1.PNG": png(1),
            "a/._1.PNG": b"macOS's companion file",
            "a/notes.txt": b"",
            "loose.png": png(2),
            "b/2.png": png(3),
        }
    )
    assert [name for name, _ in images.samples] == ["a/1.PNG", "b/2.png"]


def test_the_transform_is_applied(
    open_images: Callable[..., FolderImages], tree: dict[str, bytes]
) -> None:
    assert open_images(tree, transform=lambda image: image.size)[0] == ((13, 9), 0)


def test_validation_uses_the_class_numbers_of_train(
    open_images: Callable[..., FolderImages], tree: dict[str, bytes]
) -> None:
    images = open_images({"b/2.png": tree["b/2.png"]}, classes=["a", "b", "c-d"])
    assert images.classes == ["a", "b", "c-d"]
    assert images[0][1] == 1


def test_a_class_that_train_lacks_is_named(
    open_images: Callable[..., FolderImages], tree: dict[str, bytes]
) -> None:
    with pytest.raises(
        DataError,
        match=r"1 class\(es\) that train, or the checkpoint, lacks: b; `python -m",
    ):
        open_images(tree, classes=["a", "c-d"])


def test_many_classes_that_train_lacks_are_counted(
    open_images: Callable[..., FolderImages], png: Callable[[int], bytes]
) -> None:
    files = {f"{name}/1.png": png(0) for name in "abcdef"}
    with pytest.raises(
        DataError, match=r"5 class\(es\) that train, or .*, lacks: a, b, c, \.\.\.; "
    ):
        open_images(files, classes=["f"])


@pytest.mark.parametrize(
    "files",
    [{"readme.txt": b""}, {"0001.png": b"flat"}, {"a/1.txt": b""}],
    ids=["no_image", "flat", "no_image_in_class"],
)
def test_data_without_images_says_what_was_expected(
    open_images: Callable[..., FolderImages], files: dict[str, bytes]
) -> None:
    with pytest.raises(DataError, match=r"no images in .*train.*expected <class>/<image>.jpg"):
        open_images(files)


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in .*expected <class>/<image>.jpg"):
        FolderImages(tmp_path)


def test_a_missing_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*val: expected .*val/<class>"):
        build_imagenet(tmp_path, "val")


def test_a_folder_that_cannot_be_listed_is_an_error(
    tree: dict[str, bytes],
    write_folder: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = write_folder(tmp_path / "train", tree)
    scandir = __import__("os").scandir

    def refuse(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"cannot list .*b: Permission denied"):
        FolderImages(root)


def test_a_split_is_a_folder_or_a_tar(
    tree: dict[str, bytes], write_tar: Write, write_folder: Write, tmp_path: Path
) -> None:
    write_folder(tmp_path / "train", tree)
    write_tar(tmp_path / "val.tar", tree)
    assert isinstance(build_imagenet(tmp_path, "train"), FolderImages)
    assert isinstance(build_imagenet(tmp_path, "val", load_tar=True), TarImages)
    with pytest.raises(DataError, match=r"no .*train\.tar, but .* exists: drop --load-tar"):
        build_imagenet(tmp_path, "train", load_tar=True)
    with pytest.raises(DataError, match=r"no folder .*val, but .* exists: add --load-tar"):
        build_imagenet(tmp_path, "val")
