"""YOLO data sets of Ultralytics, Roboflow and CVAT, converted to COCO's format."""

import json
from pathlib import Path

import pytest

from datasets import SplitOptions, build_coco
from datasets.check import check_coco
from datasets.convert import main
from tests.datasets.check_data import SIZE, picture
from tests.datasets.test_exif import BOX, box_of_pixels, stored

WIDTH, HEIGHT = SIZE
LABELS = "1 0.5 0.5 0.25 0.2\n0 0.125 0.1 0.25 0.2\n"
BOXES = [[15.0, 12.0, 25.0, 18.0], [0.0, 0.0, 10.0, 6.0]]


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def ultralytics(root: Path) -> Path:
    """Write the layout of Ultralytics: images/train and labels/train, names as a mapping."""
    for number, split in enumerate(("train", "val")):
        for i in range(3):
            write(root / "images" / split / f"{i}.png", picture(10 * number + i))
            write(root / "labels" / split / f"{i}.txt", LABELS)
    write(
        root / "data.yaml",
        "path: ../datasets/coco8 # dataset root dir\ntrain: images/train\nval: images/val\n"
        "test: # test images (optional)\n\nnames:\n  0: person\n  1: bicycle\n",
    )
    return root


def roboflow(root: Path) -> Path:
    """Write the layout of Roboflow: train/images and train/labels, names as a list."""
    for number, split in enumerate(("train", "valid", "test")):
        for i in range(3):
            write(root / split / "images" / f"{i}.png", picture(10 * number + i))
            write(root / split / "labels" / f"{i}.txt", LABELS)
    write(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
        "names: ['person', 'bicycle']\n",
    )
    return root


def cvat(root: Path) -> Path:
    """Write the layout of CVAT: a list of the images of the only subset."""
    for i in range(4):
        write(root / "images" / "train" / f"{i}.png", picture(i))
        write(root / "labels" / "train" / f"{i}.txt", LABELS)
    write(root / "train.txt", "".join(f"images/train/{i}.png\n" for i in range(4)))
    write(root / "data.yaml", "path: ./\ntrain: train.txt\nnames:\n  0: person\n  1: bicycle\n")
    return root


@pytest.mark.parametrize("layout", [ultralytics, roboflow])
def test_a_converted_data_set_needs_only_its_path(
    layout: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layout(tmp_path / "yolo")
    assert main(["yolo", str(root / "data.yaml")]) == 0
    assert "instances_train.json: 3 images, 6 objects, 2 classes" in capsys.readouterr().out
    for split in ("train", "val"):
        data = build_coco(split, root)
        assert len(data) == 3
        assert data.classes == ["person", "bicycle"]
        assert data[0][1]["boxes"].tolist() == BOXES
        assert data[0][1]["labels"].tolist() == [1, 0]
    assert check_coco(root, read_images=True).findings == []


def test_a_data_set_without_val_is_converted_and_split(tmp_path: Path) -> None:
    root = cvat(tmp_path)
    assert main(["yolo", str(root)]) == 0
    split = SplitOptions(0.25)
    parts = [build_coco(name, root, train_val_split=split) for name in ("train", "val")]
    assert [len(part) for part in parts] == [3, 1]


def test_the_annotations_can_be_written_elsewhere(tmp_path: Path) -> None:
    root = ultralytics(tmp_path / "read_only")
    assert main(["yolo", str(root), "--output_dir", str(tmp_path / "new")]) == 0
    assert not (root / "annotations").exists()
    data = build_coco("val", tmp_path / "new")
    assert data[0][1]["boxes"].tolist() == BOXES


def test_polygons_become_masks(tmp_path: Path) -> None:
    root = cvat(tmp_path)
    for i in range(4):
        write(root / "labels" / "train" / f"{i}.txt", "0 0.25 0.2 0.5 0.2 0.5 0.6 0.25 0.6\n")
    main(["yolo", str(root)])
    file = root / "annotations" / "instances_train.json"
    data = build_coco("train", images=root, annotations=file, with_masks=True)
    target = data[0][1]
    assert target["boxes"].tolist() == [[10, 6, 20, 18]]
    assert target["area"].tolist() == [120]
    expected = target["masks"].new_zeros(1, HEIGHT, WIDTH)
    expected[:, 6:18, 10:20] = True
    assert (target["masks"] == expected).all()


def test_keypoints_are_left_out(tmp_path: Path) -> None:
    root = cvat(tmp_path)
    yaml = root / "data.yaml"
    yaml.write_text(yaml.read_text() + "kpt_shape: [2, 3]\n")
    write(root / "labels" / "train" / "0.txt", "0 0.125 0.1 0.25 0.2 0.1 0.2 2 0.3 0.4 1\n")
    main(["yolo", str(root)])
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    assert content["annotations"][0]["bbox"] == [0, 0, 10, 6]


def test_boxes_of_a_turned_photograph_contain_its_object(tmp_path: Path) -> None:
    root = cvat(tmp_path)
    for file in (root / "images" / "train").iterdir():
        file.unlink()
    write(root / "images" / "train" / "0.jpg", stored(6))
    x, y, w, h = BOX
    label = f"0 {(x + w / 2) / 60} {(y + h / 2) / 40} {w / 60} {h / 40}\n"
    write(root / "labels" / "train" / "0.txt", label)
    write(root / "train.txt", "./images/train/0.jpg\n")
    main(["yolo", str(root)])
    file = root / "annotations" / "instances_train.json"
    image, target = build_coco("train", images=root, annotations=file)[0]
    assert target["boxes"].round().tolist() == [box_of_pixels(image)]


def test_an_image_without_labels_has_no_objects_and_a_damaged_one_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = cvat(tmp_path)
    (root / "labels" / "train" / "0.txt").unlink()
    write(root / "images" / "train" / "1.png", "text")
    assert main(["yolo", str(root)]) == 1
    printed = capsys.readouterr()
    assert "3 images, 4 objects, 2 classes" in printed.out
    assert "left out: " in printed.err
    assert "1.png" in printed.err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("labels/train/0.txt", "2 0.5 0.5 0.1 0.1", r"0\.txt, line 1: class must be one of the 2"),
        ("labels/train/0.txt", "\n0 0.5 0.5", "line 2: a line must be a class and 4 numbers"),
        ("labels/train/0.txt", "0 a 0.5 0.1 0.1", "line 1: could not convert string to float"),
        ("labels/train/0.txt", "0 nan 0.5 0.1 0.1", "line 1: numbers must be finite"),
        ("data.yaml", "train: train.txt\n", r"data\.yaml must have names"),
        ("data.yaml", "names: [a]\n", r"data\.yaml must have train"),
        ("data.yaml", "names: [a]\ntrain: none\n", r"there is no .*none, which .*data\.yaml names"),
        ("data.yaml", "names: [a\n", r"data\.yaml is not YAML"),
        ("train.txt", "images/none.png\n", "there are no readable images of train"),
    ],
)
def test_a_mistake_is_one_sentence(file: str, content: str, message: str, tmp_path: Path) -> None:
    root = cvat(tmp_path)
    write(root / file, content)
    with pytest.raises(SystemExit, match=message) as stopped:
        main(["yolo", str(root)])
    assert "\n" not in str(stopped.value)
    assert not (root / "annotations").exists()


def test_annotations_are_only_overwritten_with_force(tmp_path: Path) -> None:
    root = cvat(tmp_path)
    path = root / "annotations" / "instances_train.json"
    write(path, "mine")
    with pytest.raises(SystemExit, match="exists: --force overwrites it"):
        main(["yolo", str(root)])
    assert path.read_text() == "mine"
    assert main(["yolo", str(root), "--force"]) == 0
    assert json.loads(path.read_text())["images"]
