"""The check of detection data: each planted problem is found, and none on a clean data set."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets import DataError, build_coco
from datasets.check import Report, check_coco
from tests.datasets.check_data import Coco, picture

# Kind, level, split and number of cases.
Found = tuple[str, str, str, int]


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    """A clean data set."""
    return Coco(tmp_path / "data")


def found(report: Report) -> list[Found]:
    return [(f.kind, f.level, f.split, f.count) for f in report.findings]


def check(coco: Coco) -> Report:
    return check_coco(coco.write(), with_masks=True, read_images=True)


def test_nothing_is_found_in_a_clean_data_set(coco: Coco) -> None:
    report = check(coco)
    assert found(report) == []
    assert report.exit_code == 0
    train, val = report.summaries
    assert (train.images, train.decoded, train.counts) == (12, 12, {"cat": 12, "dog": 12})
    assert (val.images, val.decoded, val.counts) == (4, 4, {"cat": 4, "dog": 4})


def test_a_zip_has_the_report_of_the_folder(coco: Coco) -> None:
    coco.files["train"]["3.png"] = b"GIF89a"
    coco.files["val"]["50.png"] = coco.files["train"]["7.png"]
    del coco.files["train"]["4.png"]
    folder = check_coco(coco.write(), read_images=True)
    for split, files in coco.files.items():
        with zipfile.ZipFile(coco.root / f"{split}2017.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(f"{split}2017/{name}", content)
                (coco.root / f"{split}2017" / name).unlink()
    packed = check_coco(coco.root, read_images=True, num_workers=2)
    assert found(packed) == found(folder) != []


def entry(coco: Coco, number: int = 0) -> dict:
    return coco.train["annotations"][number]


def set_size(coco: Coco, number: int, width: int, height: int) -> None:
    coco.train["images"][number] |= {"width": width, "height": height}


def plant_missing(coco: Coco) -> None:
    del coco.files["train"]["3.png"]
    del coco.files["train"]["5.png"]


def plant_copy(coco: Coco) -> None:
    coco.files["train"]["3.png"] = coco.files["train"]["4.png"]


def plant_leak(coco: Coco) -> None:
    # Other bytes with equal pixels.
    coco.files["val"]["51.png"] = picture(4) + b"\0"


def plant_turned(coco: Coco) -> None:
    # Stored turned; the annotations of image 3 fit the upright view, those of image 4 do not.
    for number in (3, 4):
        coco.files["train"][f"{number}.png"] = picture(number, 6, size=(30, 40))
    set_size(coco, 4, 30, 40)
    for box in coco.train["annotations"]:
        box["bbox"] = [2, 3, 10, 8]


def plant_crowd(coco: Coco) -> None:
    entry(coco)["iscrowd"] = 1


def plant_placeless(coco: Coco) -> None:
    coco.train["annotations"] += [{**entry(coco), "id": 9999, "image_id": 77}]


def plant_rare(coco: Coco) -> None:
    coco.train["categories"] += [{"id": 7, "name": "owl"}, {"id": 8, "name": "fox"}]
    coco.train["annotations"] += [{**entry(coco), "id": 9999, "category_id": 8}]


def plant_imbalance(coco: Coco) -> None:
    coco.train["annotations"] = [
        *({**entry(coco), "id": 100 + i, "image_id": i % 12} for i in range(1200)),
        *({**entry(coco, 1), "id": 9000 + i, "image_id": i % 12} for i in range(12)),
    ]


def plant_unlabeled(coco: Coco) -> None:
    listed = coco.train["annotations"]
    coco.train["annotations"] = [e for e in listed if e["image_id"] not in (2, 3, 4)]


def plant_new_category(coco: Coco) -> None:
    coco.val["categories"] += [{"id": 9, "name": "owl"}]
    coco.val["annotations"][0]["category_id"] = 9


def plant_renamed(coco: Coco) -> None:
    coco.val["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]


def plant_repeated_name(coco: Coco) -> None:
    coco.train["images"][3]["file_name"] = "4.png"


def plant_repeated_id(coco: Coco) -> None:
    coco.train["images"] += [{**coco.train["images"][3], "file_name": "4.png"}]
    coco.train["images"][4]["file_name"] = "3.png"


def plant_corrupt(coco: Coco) -> None:
    files = coco.files["train"]
    files["3.png"] = files["3.png"][:-2000]
    files["4.png"] = b"<html>404 not found</html>"


def plant_normalized(coco: Coco) -> None:
    for annotation in coco.train["annotations"]:
        annotation["bbox"] = [0.2, 0.3, 0.5, 0.1]


def plant_many_corrupt(coco: Coco) -> None:
    for name in list(coco.files["train"])[:10]:
        coco.files["train"][name] = b""


CASES: dict[str, tuple[Callable[[Coco], object], list[Found]]] = {
    "missing": (plant_missing, [("missing images", "error", "train", 2)]),
    "corrupt": (plant_corrupt, [("corrupt images", "warning", "train", 2)]),
    "many_corrupt": (plant_many_corrupt, [("corrupt images", "error", "train", 10)]),
    "copy": (plant_copy, [("duplicate images", "note", "train", 1)]),
    "leak": (plant_leak, [("images in both splits", "warning", "train and val", 1)]),
    "other_size": (
        lambda coco: set_size(coco, 3, 80, 60),
        [("images of another size", "warning", "train", 1)],
    ),
    "swapped_size": (
        lambda coco: set_size(coco, 3, 30, 40),
        [("images of another size", "warning", "train", 1)],
    ),
    "turned": (plant_turned, [("EXIF-rotated images", "note", "train", 2)]),
    "upside_down": (
        lambda coco: coco.files["train"].update({"3.png": picture(3, 3)}),
        [("EXIF-rotated images with unknown view", "warning", "train", 1)],
    ),
    "outside": (
        lambda coco: entry(coco).update(bbox=[38, 3, 10, 8]),
        [("boxes outside the image", "warning", "train", 1)],
    ),
    "entirely_outside": (
        lambda coco: entry(coco).update(bbox=[2, 40, 10, 8]),
        [("boxes outside the image", "warning", "train", 1)],
    ),
    "rounded": (lambda coco: entry(coco).update(bbox=[-0.6, 0, 41.2, 30.9]), []),
    "empty": (
        lambda coco: entry(coco).update(bbox=[2, 3, 0, 8]),
        [("empty boxes", "warning", "train", 1)],
    ),
    "normalized": (plant_normalized, [("normalized boxes", "warning", "train", 24)]),
    "not_finite": (
        lambda coco: entry(coco).update(bbox=[2, 3, float("nan"), 8]),
        [("invalid boxes", "error", "train", 1)],
    ),
    "category": (
        lambda coco: entry(coco).update(category_id=44),
        [("objects of unknown categories", "error", "train", 1)],
    ),
    "segmentation": (
        lambda coco: entry(coco).update(segmentation=[]),
        [("invalid segmentations", "error", "train", 1)],
    ),
    "rle_size": (
        lambda coco: entry(coco).update(segmentation={"size": [40, 30], "counts": [0, 1200]}),
        [("invalid segmentations", "error", "train", 1)],
    ),
    "rle_counts": (
        lambda coco: entry(coco).update(segmentation={"size": [30, 40], "counts": [0, 1199]}),
        [("invalid segmentations", "error", "train", 1)],
    ),
    "crowd": (plant_crowd, [("crowd annotations", "note", "train", 1)]),
    "unlisted_image": (plant_placeless, [("objects of unlisted images", "warning", "train", 1)]),
    "rare": (
        plant_rare,
        [
            ("classes without objects", "warning", "train", 1),
            ("classes with one object", "warning", "train", 1),
        ],
    ),
    "imbalance": (plant_imbalance, [("imbalanced classes", "note", "train", 2)]),
    "unlabeled": (plant_unlabeled, [("images without objects", "note", "train", 3)]),
    "no_objects": (
        lambda coco: coco.train.update(annotations=[]),
        [("no objects", "warning", "train", 1)],
    ),
    "new_category": (
        plant_new_category,
        [("categories that train lacks", "error", "train and val", 1)],
    ),
    "renamed": (plant_renamed, [("categories with two names", "warning", "train and val", 2)]),
    "repeated_name": (
        plant_repeated_name,
        [("repeated file names", "warning", "train", 1), ("duplicate images", "note", "train", 1)],
    ),
    "repeated_id": (plant_repeated_id, [("repeated image ids", "error", "train", 1)]),
    "not_coco": (
        lambda coco: coco.train.update(images=7),
        [("cannot be opened", "error", "train", 1)],
    ),
    "no_image": (
        lambda coco: coco.val.update(images=[], annotations=[]),
        [("cannot be opened", "error", "val", 1)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_planted_problem_is_found_and_no_other(case: str, coco: Coco) -> None:
    plant, expected = CASES[case]
    plant(coco)
    report = check(coco)
    assert found(report) == expected
    assert report.exit_code == any(level != "note" for _, level, _, _ in expected)


def test_all_problems_are_found_together(coco: Coco) -> None:
    # Each uses images of its own.
    coco.files["train"]["1.png"] = b"text"
    del coco.files["train"]["2.png"]
    coco.files["val"]["50.png"] = coco.files["train"]["3.png"]
    coco.files["train"]["4.png"] = coco.files["train"]["5.png"]
    set_size(coco, 6, 99, 99)
    coco.files["train"]["7.png"] = picture(7, 3)
    entry(coco, 16).update(bbox=[2, 3, 10, -1])
    entry(coco, 18).update(bbox=[2, 3, 10, 80])
    entry(coco, 20).update(category_id=44)
    plant_renamed(coco)
    report = check(coco)
    assert {kind for kind, *_ in found(report)} == {
        "corrupt images",
        "missing images",
        "images in both splits",
        "duplicate images",
        "images of another size",
        "EXIF-rotated images with unknown view",
        "empty boxes",
        "boxes outside the image",
        "objects of unknown categories",
        "categories with two names",
    }


STOPS = {name for name, (_, expected) in CASES.items() if expected and expected[0][1] == "error"}


# These stop a training in its first epoch: see test_resilient.py and test_coco_mistakes.py.
LATER = {"many_corrupt", "rle_size", "rle_counts"}


@pytest.mark.parametrize("case", sorted(STOPS - LATER))
def test_training_really_stops_at_an_error(case: str, coco: Coco) -> None:
    CASES[case][0](coco)
    root = coco.write()

    def open_both() -> None:
        train = build_coco("train", root, with_masks=True)
        build_coco("val", root, with_masks=True, label_map=train.label_to_category)

    with pytest.raises(DataError):
        open_both()


def test_images_listed_in_both_splits_are_found_without_reading_them(coco: Coco) -> None:
    root = coco.write()
    path = root / "val.json"
    listed = [{**image, "id": 100 + image["id"]} for image in coco.train["images"][:2]]
    path.write_text(json.dumps(coco.train | {"images": listed, "annotations": []}))
    images = str(root / "train2017")
    files = {
        "train": (images, str(root / "annotations/instances_train2017.json")),
        "val": (images, str(path)),
    }
    report = check_coco(own_files=files)
    expected = ("images in both splits", "warning", "train and val", 2)
    assert expected in found(report)
