"""Tests of the written scenes: reproducible, complete or not at all, with tight boxes."""

import io
import itertools
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from datasets import CocoImages, DataError, build_coco, scenes
from datasets.embedded import split_digits
from datasets.scene_drawing import draw_scene
from datasets.scenes import SceneOptions, write_scenes

ROOT = Path(__file__).parents[2]
FEW = SceneOptions(train=40, val=7)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "new" / "scenes", FEW)


def contents(root: Path) -> dict[str, bytes]:
    """Return {name: content} of the files in a folder, without the stored indices."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(".index.npz")
    }


def annotations(root: Path, split: str) -> dict[str, Any]:
    """Read the annotation file of a split."""
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def test_the_files_have_the_names_of_coco(few: Path) -> None:
    assert sorted(contents(few)) == [
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "scenes.txt",
        "train2017.zip",
        "val2017.zip",
    ]
    with zipfile.ZipFile(few / "train2017.zip") as archive:
        members = archive.infolist()
        image = Image.open(io.BytesIO(archive.read(members[0])))
    assert [member.filename for member in members[:2]] == [
        "train2017/000000000001.jpg",
        "train2017/000000000002.jpg",
    ]
    assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}
    assert (image.format, image.size, image.mode) == ("JPEG", (96, 96), "RGB")
    ids = [image["id"] for split in ("train", "val") for image in annotations(few, split)["images"]]
    assert ids == list(range(1, 48))


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_tight_inside_the_image_and_do_not_touch(few: Path, split: str) -> None:
    data = annotations(few, split)
    by_image: dict[int, list[list[int]]] = {image["id"]: [] for image in data["images"]}
    for entry in data["annotations"]:
        x, y, width, height = entry["bbox"]
        by_image[entry["image_id"]].append([x, y, x + width, y + height])
        mask = coco_mask.decode(entry["segmentation"])
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == [
            *(x, y, x + width, y + height)
        ]
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= 96
        assert entry["area"] == mask.sum() > 20
        assert 18 <= height + 1 <= 37
        assert 1 <= entry["category_id"] <= 10
    assert {len(boxes) for boxes in by_image.values()} <= {1, 2, 3, 4}
    for boxes in by_image.values():
        for one, other in itertools.combinations(np.array(boxes), 2):
            low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
            assert (high < low).any(), "at least one pixel between them"


def test_ink_is_brighter_than_the_background(few: Path) -> None:
    data = build_coco("val", few, with_masks=True)
    for image, target in (data[i] for i in range(len(data))):
        brightest = np.asarray(image).max(axis=2)
        ink = target["masks"].any(dim=0).numpy()
        assert brightest[ink].mean() > 2 * brightest[~ink].mean()
        for mask in target["masks"].numpy():
            assert brightest[mask].max() > 200


def test_every_digit_and_every_count_is_about_equally_frequent() -> None:
    glyphs = split_digits()["train"]
    drawn = [draw_scene(glyphs, 96, np.random.default_rng(seed)) for seed in range(300)]
    counts = np.bincount([len(scene.digits) for scene in drawn], minlength=5)
    digits = np.bincount([digit for scene in drawn for digit in scene.digits], minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 50
    assert digits.min() > 0.06 * digits.sum()


def test_the_splits_use_different_digit_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[set[int]] = []

    def draw(glyphs: list[Any], size: int, draw: np.random.Generator) -> Any:
        used.append({number for number, _, _ in glyphs})
        return draw_scene(glyphs, size, draw)

    monkeypatch.setattr(scenes, "draw_scene", draw)
    write_scenes(tmp_path / "scenes", SceneOptions(train=1, val=1))
    train, val = used
    assert (len(train), len(val), len(train & val)) == (1438, 359, 0)


def test_writing_again_changes_nothing_and_another_folder_gets_the_same(
    few: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in few.rglob("*")}
    assert write_scenes(few, FEW) == few
    assert {path: path.stat().st_mtime_ns for path in few.rglob("*")} == before
    (tmp_path / "empty").mkdir()
    assert contents(write_scenes(tmp_path / "empty", FEW)) == contents(few)


def test_scenes_depend_on_the_seed_and_not_on_their_number(few: Path, tmp_path: Path) -> None:
    other = write_scenes(tmp_path / "seed", SceneOptions(train=40, val=7, seed=1))
    assert contents(other)["val2017.zip"] != contents(few)["val2017.zip"]
    more = build_coco("train", write_scenes(tmp_path / "more", SceneOptions(train=45, val=7)))
    train = build_coco("train", few)
    assert all(np.array_equal(more[i][0], train[i][0]) for i in range(0, 40, 13))


def test_folders_hold_the_same_images(few: Path, tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", SceneOptions(train=40, val=7, folders=True))
    assert not list(root.glob("*.zip"))
    for split in ("train", "val"):
        folder, archive = build_coco(split, root), build_coco(split, few)
        assert len(folder) == len(archive)
        for i in range(0, len(folder), 5):
            assert np.array_equal(folder[i][0], archive[i][0])
            assert folder[i][1]["boxes"].tolist() == archive[i][1]["boxes"].tolist()


def test_the_labels_are_the_digits(few: Path) -> None:
    train = build_coco("train", few)
    assert train.classes == list("0123456789")
    assert train.label_to_category == {digit: digit + 1 for digit in range(10)}


def test_several_threads_can_write_at_the_same_time(tmp_path: Path, few: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        roots = list(pool.map(lambda root: write_scenes(root, FEW), [tmp_path / "scenes"] * 3))
    assert roots == [tmp_path / "scenes"] * 3
    assert contents(tmp_path / "scenes") == contents(few)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, files: dict[str, bytes]) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(scenes, "_write_zip", fail)
        with pytest.raises(DataError, match=r"cannot write the scenes.*No space left"):
            write_scenes(tmp_path / "scenes", FEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["coco", "other_scenes"])
def test_other_data_is_not_changed(kind: str, few: Path, tmp_path: Path) -> None:
    root = few
    if kind == "coco":
        root = tmp_path / "coco"
        (root / "train2017").mkdir(parents=True)
    before = contents(root)
    with pytest.raises(DataError, match="holds other files"):
        write_scenes(root, SceneOptions(train=3, val=3))
    assert contents(root) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [({"train": 0}, "train"), ({"size": 35}, "size .*36.*35"), ({"seed": -1}, "seed")],
    ids=["train", "size", "seed"],
)
def test_an_invalid_option_is_named(options: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SceneOptions(**options)


def test_the_smallest_canvas_holds_one_digit(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "scenes", SceneOptions(train=5, val=5, size=36))
    data = CocoImages(root / "val2017.zip", root / "annotations" / "instances_val2017.json")
    assert all(len(data[i][1]["boxes"]) >= 1 for i in range(5))


def test_the_command_writes_the_scenes(tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    command = [sys.executable, "-m", "datasets.scenes", str(root)]
    command += ["--folders", "--train", "30", "--val", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{root}\n", "")
    assert len(list((root / "train2017").iterdir())) == 30
    assert len(list((root / "val2017").iterdir())) == 20


def test_the_command_fails_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with pytest.raises(SystemExit) as caught:
        scenes.main([str(tmp_path)])
    assert str(caught.value.code).startswith(f"error: {tmp_path} holds other files")
