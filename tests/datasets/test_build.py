"""Tests of `build_dataset`: the data set of each name, and errors for missing data."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR100

from datasets import (
    DataError,
    EvalSampler,
    INaturalistImages,
    ResilientDataset,
    SeededDataset,
    build_dataset,
    build_transform,
)

Write = Callable[..., Path]

# Folder of each species: super category and number. Numbers are unique over super categories.
SPECIES = ["Plantae/0", "Aves/1", "Plantae/2"]
RANKS = [
    {"id": 0, "name": "Acer rubrum", "kingdom": "Plantae", "genus": "Acer"},
    {"id": 1, "name": "Corvus corax", "kingdom": "Animalia", "genus": "Corvus"},
    {"id": 2, "name": "Acer negundo", "kingdom": "Plantae", "genus": "Acer"},
]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with CIFAR-100's files, but four images instead of 60,000."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()

    def write(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def images(count: int, seed: int) -> dict[str, object]:
        pixels = np.random.RandomState(seed).randint(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "fine_labels": list(range(count))}

    names = [f"class {i}" for i in range(100)]
    meta = write("meta", {"fine_label_names": names})
    monkeypatch.setattr(CIFAR100, "train_list", [["train", write("train", images(3, 0))]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", write("test", images(1, 1))]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": meta})
    return tmp_path


@pytest.fixture
def inat(tmp_path: Path, write_folder: Write, png: Callable[[int], bytes]) -> Path:
    """iNaturalist 2018 and 2019 with three species: two training images and one for validation."""
    for year in ("2018", "2019"):
        splits: dict[str, list[str]] = {"train": [], "val": []}
        for number, species in enumerate(SPECIES):
            for i in range(3):
                name = f"{species}/{number}{i}.png"
                write_folder(tmp_path / year, {name: png(10 * number + i)})
                splits["val" if i == 1 else "train"].append(f"train_val{year}/{name}")
        for split, names in splits.items():
            images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
            (tmp_path / f"{split}{year}.json").write_text(json.dumps({"images": images}))
    (tmp_path / "categories.json").write_text(json.dumps(RANKS))
    return tmp_path


def test_cifar_is_opened(cifar: Path) -> None:
    train, val = (build_dataset("CIFAR", cifar, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 1)
    assert len(train.classes) == len(val.classes) == 100
    assert isinstance(train, ResilientDataset)
    image, target = train[2]
    assert image.size == (32, 32)
    assert target == 2


def test_missing_cifar_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"CIFAR-100 .*expected .*cifar-100-python"):
        build_dataset("CIFAR", tmp_path, "train")


def test_damaged_cifar_is_reported(cifar: Path) -> None:
    file = cifar / CIFAR100.base_folder / "train"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"CIFAR-100 .*expected .*cifar-100-python"):
        build_dataset("CIFAR", cifar, "train")


@pytest.mark.parametrize(("data_set", "year"), [("INAT", "2018"), ("INAT19", "2019")])
def test_inaturalist_follows_the_official_split(inat: Path, data_set: str, year: str) -> None:
    train, val = (build_dataset(data_set, inat, split) for split in ("train", "val"))
    assert train.dataset.source.name == year
    assert train.dataset.samples == [
        ("Aves/1/10.png", 1),
        ("Aves/1/12.png", 1),
        ("Plantae/0/00.png", 0),
        ("Plantae/0/02.png", 0),
        ("Plantae/2/20.png", 2),
        ("Plantae/2/22.png", 2),
    ]
    assert val.dataset.samples == [
        ("Aves/1/11.png", 1),
        ("Plantae/0/01.png", 0),
        ("Plantae/2/21.png", 2),
    ]
    assert train.classes == val.classes == SPECIES
    assert train[0][0].size == (13, 9)


@pytest.mark.parametrize(
    ("category", "classes", "targets"),
    [
        ("name", SPECIES, [1, 0, 2]),
        ("supercategory", ["Aves", "Plantae"], [0, 1, 1]),
        ("kingdom", ["Animalia", "Plantae"], [0, 1, 1]),
        ("genus", ["Acer", "Corvus"], [1, 0, 0]),
    ],
    ids=["name", "supercategory", "kingdom", "genus"],
)
def test_inaturalist_has_the_classes_of_the_chosen_rank(
    inat: Path, category: str, classes: list[str], targets: list[int]
) -> None:
    val = INaturalistImages(inat, "2018", "val", category=category)
    assert val.classes == classes
    assert val.targets.tolist() == targets


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "2018").rename(root / "2017"), "no folder .*2018"),
        (lambda root: (root / "val2018.json").unlink(), r"cannot read .*val2018\.json: No such"),
        (lambda root: (root / "val2018.json").write_text("{"), r"val2018\.json is not valid JSON"),
        (
            lambda root: (root / "val2018.json").write_text("{}"),
            "not an iNaturalist annotation file",
        ),
        (lambda root: (root / "val2018.json").write_text('{"images": []}'), "lists no images"),
        (
            lambda root: (root / "2018/Aves/1/11.png").unlink(),
            r"lacks 1 of the 3 images of val, the first is Aves/1/11\.png",
        ),
        (lambda root: (root / "2018/Aves/1").rename(root / "2018/Aves/crow"), "cannot be opened"),
        (lambda root: (root / "categories.json").write_text("[]"), "genus of every species"),
    ],
    ids=[
        "no_images",
        "no_annotation",
        "half_json",
        "other_json",
        "empty_split",
        "image_missing",
        "other_folders",
        "rank_missing",
    ],
)
def test_damaged_inaturalist_is_reported(
    inat: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(inat)
    with pytest.raises(DataError, match=message) as caught:
        build_dataset("INAT", inat, "val", inat_category="genus")
    assert "\n" not in str(caught.value)


def test_missing_inaturalist_does_not_create_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        build_dataset("INAT", tmp_path / "typo", "train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("load_tar", [False, True], ids=["folder", "tar"])
def test_digits_are_written_at_the_first_use_and_can_be_loaded(
    tmp_path: Path, load_tar: bool
) -> None:
    transform = build_transform(True, input_size=24, augment="affine")
    train = build_dataset("DIGITS", tmp_path / "d", "train", transform=transform, load_tar=load_tar)
    val = build_dataset(
        "DIGITS",
        tmp_path / "d",
        "val",
        transform=build_transform(False, input_size=24, augment="affine"),
        load_tar=load_tar,
        classes=train.classes,
    )
    assert (len(train), len(val)) == (1438, 359)
    assert len(train.classes) == len(val.classes) == 10
    loader = DataLoader(
        SeededDataset(val), sampler=EvalSampler(len(val), batch_size=100), batch_size=100
    )
    batches = [(images.shape, len(targets)) for images, targets in loader]
    assert batches == [((100, 3, 24, 24), 100)] * 3 + [((59, 3, 24, 24), 59)]


def test_imagenet_validation_uses_the_class_numbers_of_train(
    tmp_path: Path, write_folder: Write, tree: dict[str, bytes]
) -> None:
    write_folder(tmp_path / "train", tree)
    write_folder(tmp_path / "val", {"b/1.png": tree["b/2.png"]})
    train = build_dataset("IMNET", tmp_path, "train")
    val = build_dataset("IMNET", tmp_path, "val", classes=train.classes)
    assert train.classes == ["a", "b", "c-d"]
    assert val[0][1] == 1
    write_folder(tmp_path / "val", {"z/1.png": tree["b/2.png"]})
    with pytest.raises(DataError, match=r"1 class\(es\) that train, or the checkpoint, lacks: z"):
        build_dataset("IMNET", tmp_path, "val", classes=train.classes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("MNIST", "train"), ValueError, "data_set must be one of IMNET, CIFAR.*got 'MNIST'"),
        (("IMNET", "test"), ValueError, "split must be train or val, got 'test'"),
        (("IMNET", "train"), DataError, "there is no folder"),
    ],
    ids=["data_set", "split", "data_path"],
)
def test_an_invalid_argument_is_named(
    arguments: tuple[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    data_set, split = arguments
    with pytest.raises(error, match=message):
        build_dataset(data_set, tmp_path, split)


def test_load_tar_is_refused_for_data_sets_without_tars(cifar: Path) -> None:
    with pytest.raises(DataError, match=r"--load-tar is for .* and DIRECTIONS: CIFAR has"):
        build_dataset("CIFAR", cifar, "train", load_tar=True)


def test_a_part_of_cifar_and_inaturalist_is_opened(cifar: Path, inat: Path) -> None:
    train = build_dataset("CIFAR", cifar, "train", max_train_samples=2)
    assert len(train) == 2
    assert len({train[i][1] for i in range(2)}) == 2
    assert len(build_dataset("INAT", inat, "train", max_train_samples=3)) == 3
