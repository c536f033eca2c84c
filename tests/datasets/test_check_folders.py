"""The check of class folders: each planted problem is found, and none on a clean data set."""

from collections.abc import Callable
from pathlib import Path

import pytest

from datasets.check import Report, check_folders
from tests.datasets.check_data import Folders, picture

Found = tuple[str, str, str, int]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """A clean data set."""
    return Folders(tmp_path / "data")


def found(report: Report) -> list[Found]:
    return [(f.kind, f.level, f.split, f.count) for f in report.findings]


def test_nothing_is_found_in_clean_folders(folders: Folders) -> None:
    report = check_folders(folders.write(), read_images=True)
    assert found(report) == []
    assert report.exit_code == 0
    train, val = report.summaries
    assert (train.images, train.decoded, train.counts) == (12, 12, {"cat": 4, "dog": 4, "fox": 4})
    assert (val.images, val.decoded, val.counts) == (6, 6, {"cat": 2, "dog": 2, "fox": 2})


def plant(**files: bytes | None) -> Callable[[Folders], None]:
    """Return a function that adds files, with `__` for `/` in their names; None removes one."""

    def change(folders: Folders) -> None:
        for key, content in files.items():
            name = key.replace("__", "/").replace("_dot_", ".")
            folders.files[name] = content
            if content is None:
                del folders.files[name]

    return change


def plant_imbalance(folders: Folders) -> None:
    folders.files |= {f"train/cat/more{i}.png": picture(1000 + i) for i in range(396)}


CASES: dict[str, tuple[Callable[[Folders], object], list[Found]]] = {
    "corrupt": (
        plant(train__cat__0_dot_png=b"<html>404</html>"),
        [("corrupt images", "warning", "train", 1)],
    ),
    "huge": (
        # The header of a PNG with 50,000 x 50,000 pixels.
        plant(train__cat__0_dot_png=picture(0)[:16] + b"\0\0\xc3\x50" * 2 + picture(0)[24:]),
        [("corrupt images", "warning", "train", 1)],
    ),
    "copy": (
        plant(train__cat__0_dot_png=picture(1)),
        [("duplicate images", "note", "train", 1)],
    ),
    "two_classes": (
        plant(train__dog__new_dot_png=picture(1)),
        [
            ("copies with different classes", "warning", "train", 1),
            ("duplicate images", "note", "train", 1),
        ],
    ),
    "leak": (
        plant(val__cat__new_dot_png=picture(1)),
        [("images in both splits", "warning", "train and val", 1)],
    ),
    "turned": (
        plant(train__cat__0_dot_png=picture(0, 6)),
        [("EXIF-rotated images", "warning", "train", 1)],
    ),
    "unknown_class": (
        plant(val__owl__0_dot_png=picture(99)),
        [("classes that train lacks", "error", "train and val", 1)],
    ),
    "unmeasured_class": (
        plant(val__cat__0_dot_png=None, val__cat__1_dot_png=None),
        [("classes without validation images", "note", "val", 1)],
    ),
    "rare": (
        plant(train__owl__0_dot_png=picture(98), val__owl__0_dot_png=picture(99)),
        [("classes with one image", "warning", "train", 1)],
    ),
    "imbalance": (plant_imbalance, [("imbalanced classes", "note", "train", 3)]),
    "skipped": (
        plant(train__loose_dot_png=picture(99), val__cat__a_dot_heic=b"x", val__cat__a_dot_txt=b""),
        [("skipped images", "warning", "train", 1), ("skipped images", "warning", "val", 1)],
    ),
    "empty_class": (
        plant(train__owl__readme_dot_txt=b""),
        [("class folders without images", "warning", "train", 1)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_planted_problem_is_found_and_no_other(case: str, folders: Folders) -> None:
    change, expected = CASES[case]
    change(folders)
    report = check_folders(folders.write(), read_images=True)
    assert found(report) == expected
    assert report.exit_code == any(level != "note" for _, level, _, _ in expected)


def test_tars_have_the_report_of_the_folders(folders: Folders, write_tar: Callable) -> None:
    CASES["two_classes"][0](folders)
    CASES["corrupt"][0](folders)
    root = folders.write()
    for split in ("train", "val"):
        files = {
            name.removeprefix(f"{split}/"): content
            for name, content in folders.files.items()
            if name.startswith(split)
        }
        write_tar(root / f"{split}.tar", files)
    tars = check_folders(root, load_tar=True, read_images=True, num_workers=2)
    assert found(tars) == found(check_folders(root, read_images=True)) != []


def test_a_missing_split_is_an_error(folders: Folders) -> None:
    folders.files = {name: folders.files[name] for name in folders.files if "val" not in name}
    report = check_folders(folders.write())
    assert found(report) == [("cannot be opened", "error", "val", 1)]
    assert "there is no folder" in report.findings[0].meaning
