"""A split of the training images: stratified, saved, and the same for all processes and runs."""

import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from classification.config import parse_args
from classification.data import build_split
from datasets import DataError, SplitOptions, build_dataset, build_imagenet
from datasets.check import check_folders
from datasets.saved_split import split_images
from tests.datasets.check_data import picture

Write = Callable[..., Path]

FILES = {
    f"{label}/{i}.png": picture(100 * number + i, size=(8, 8))
    for number, (label, count) in enumerate({"cat": 10, "dog": 4, "fox": 2, "owl": 1}.items())
    for i in range(count)
}
SPLIT = SplitOptions(0.2, seed=3)


def names(data: object) -> set[str]:
    return {name for name, _ in data.samples}


def both(root: Path, **options: object) -> list:
    return [build_imagenet(root, s, train_val_split=SPLIT, **options) for s in ("train", "val")]


@pytest.mark.parametrize("folder", ["", "train"], ids=["class_folders", "train_folder"])
def test_class_folders_are_split_by_class(
    folder: str, tmp_path: Path, write_folder: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / folder, FILES)
    with caplog.at_level(logging.INFO):
        train, val = both(tmp_path)
    assert names(train) | names(val) == set(FILES)
    assert not names(train) & names(val)
    assert train.classes == val.classes == ["cat", "dog", "fox", "owl"]
    counts = Counter(name.split("/")[0] for name in names(val))
    # Each class is in both splits, if it has two images.
    assert counts == {"cat": 2, "dog": 1, "fox": 1}
    for data in (train, val):
        for i, (name, target) in enumerate(data.samples):
            assert data[i][1] == target == data.classes.index(name.split("/")[0])
    saved = tmp_path / f"train_val_split_{(tmp_path / folder).name}_0.2_seed3.json"
    assert set(json.loads(saved.read_text())["val"]) == names(val)
    assert f"4 of the 17 images of {tmp_path / folder} are val: saved in {saved}" in caplog.text
    assert f"read from {saved}" in caplog.text
    kinds = {f.kind for f in check_folders(tmp_path, train_val_split=SPLIT).findings}
    assert kinds == {"classes with one image", "classes without validation images"}


def test_a_tar_is_split(tmp_path: Path, write_tar: Write) -> None:
    write_tar(tmp_path / "train.tar", FILES)
    train, val = both(tmp_path, load_tar=True)
    assert (len(train), len(val)) == (13, 4)
    for data in (train, val):
        for i, (name, _) in enumerate(data.samples):
            assert data.read(i) == FILES[name]


def test_the_trainer_splits_by_its_flags(tmp_path: Path, write_folder: Write) -> None:
    write_folder(tmp_path / "photos", FILES)
    flags = ["--data-path", str(tmp_path / "photos"), "--input-size", "8"]
    config = parse_args([*flags, "--train_val_split", "0.2"])
    train = build_split(config, "train")
    val = build_split(config, "val", train.classes)
    assert (len(train), len(val)) == (13, 4)
    assert val[0][0].shape == (3, 8, 8)


def test_seeds_give_different_splits_and_each_is_saved(tmp_path: Path, write_folder: Write) -> None:
    write_folder(tmp_path / "train", FILES)
    first, again, other = (
        names(build_imagenet(tmp_path, "val", train_val_split=SplitOptions(0.2, seed)))
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(list(tmp_path.glob("train_val_split_train_0.2_seed*.json"))) == 2


def test_new_images_belong_to_train(
    tmp_path: Path, write_folder: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", FILES)
    _, before = both(tmp_path)
    write_folder(tmp_path / "train", {f"cat/new{i}.png": picture(i) for i in range(20)})
    removed = sorted(names(before))[0]
    (tmp_path / "train" / removed).unlink()
    train, val = both(tmp_path)
    assert names(val) == names(before) - {removed}
    assert len(train) == 33
    assert "1 val images of" in caplog.text


def _draw(root: Path, barrier: object, answers: object) -> None:
    barrier.wait(60)
    answers.put(split_images(root / "train", root, sorted(FILES), SPLIT))


def test_processes_draw_the_same_split_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.SimpleQueue()
    workers = [
        context.Process(target=_draw, args=(tmp_path, barrier, answers), daemon=True)
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    splits = {answers.get() for _ in workers}
    for worker in workers:
        worker.join()
    assert len(splits) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train_val_split_train_0.2_seed3.json"]


def test_a_folder_that_cannot_be_written_has_its_split_in_the_cache(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A file in place of the folder also fails for root, who may write everywhere.
    folder = tmp_path / "file"
    folder.write_text("")
    with caplog.at_level(logging.INFO):
        split = split_images(tmp_path / "train", folder, sorted(FILES), SPLIT)
    (saved,) = (cache / "irpe").iterdir()
    assert saved.name.endswith("-train_val_split_train_0.2_seed3.json")
    assert f"saved in {saved}" in caplog.text
    assert split_images(tmp_path / "train", folder, sorted(FILES), SPLIT) == split


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"val": 3}'])
def test_a_damaged_saved_split_is_reported(
    content: str, tmp_path: Path, write_folder: Write
) -> None:
    write_folder(tmp_path / "train", FILES)
    (tmp_path / "train_val_split_train_0.2_seed3.json").write_text(content)
    with pytest.raises(DataError, match=r"seed3\.json is not a saved split: delete it"):
        both(tmp_path)


def test_a_saved_split_of_other_images_is_reported(tmp_path: Path, write_folder: Write) -> None:
    write_folder(tmp_path / "train", FILES)
    path = tmp_path / "train_val_split_train_0.2_seed3.json"
    path.write_text('{"val": ["cat/other.png"]}')
    with pytest.raises(DataError, match=r"does not fit the images, 0 of 17 .*: delete it"):
        both(tmp_path)


def test_data_that_cannot_be_split_is_reported(tmp_path: Path, write_folder: Write) -> None:
    write_folder(tmp_path / "one" / "train", {"cat/0.png": picture(0), "dog/0.png": picture(1)})
    with pytest.raises(DataError, match="cannot be split: no class has two images"):
        both(tmp_path / "one")
    write_folder(tmp_path / "full", {f"{s}/{n}": FILES[n] for s in ("train", "val") for n in FILES})
    with pytest.raises(DataError, match="val is a validation split: drop --train_val_split"):
        both(tmp_path / "full")
    with pytest.raises(DataError, match="--train_val_split is for IMNET: DIGITS has a validation"):
        build_dataset("DIGITS", tmp_path / "digits", "train", train_val_split=SPLIT)
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, got 1"):
        SplitOptions(1)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_the_validation_split_may_have_another_name(
    name: str, tmp_path: Path, write_folder: Write, write_tar: Write
) -> None:
    write_folder(tmp_path / "train", FILES)
    with pytest.raises(DataError, match=r"no folder .*val: expected .* or --train_val_split 0\.2"):
        build_imagenet(tmp_path, "val")
    write_folder(tmp_path / name, {"cat/0.png": picture(1)})
    assert len(build_imagenet(tmp_path, "val")) == 1
    write_tar(tmp_path / "packed" / "train.tar", FILES)
    write_tar(tmp_path / "packed" / f"{name}.tar", {"cat/0.png": picture(1)})
    assert len(build_imagenet(tmp_path / "packed", "val", load_tar=True)) == 1
