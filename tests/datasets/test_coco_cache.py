"""Stored annotations equal those of the file, and are rebuilt if they are not valid."""

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import CocoImages, DataError, coco_cache
from datasets.coco_annotations import CocoAnnotations, read_annotations
from datasets.coco_cache import open_annotations
from tests.datasets.coco_files import FILES, changed, data

Write = Callable[..., Path]
ARRAYS = ("image_ids", "sizes", "starts", "boxes", "categories", "areas")
STORED = "instances.json.boxes.npz"


@pytest.fixture(autouse=True)
def _store_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_cache, "_SMALLEST", 1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The annotation files that were parsed."""
    parsed = []

    def read(path: Path, **options: object) -> CocoAnnotations:
        parsed.append(path)
        return read_annotations(path, **options)

    monkeypatch.setattr(coco_cache, "read_annotations", read)
    return parsed


def assert_same(one: CocoAnnotations, other: CocoAnnotations) -> None:
    """Check that all fields are equal."""
    for name in ARRAYS:
        expected, got = getattr(one, name), getattr(other, name)
        assert expected.dtype == got.dtype
        assert np.array_equal(expected, got)
    assert list(one.file_names) == list(other.file_names)
    assert (one.segmentations is None) == (other.segmentations is None)
    assert list(one.segmentations or ()) == list(other.segmentations or ())
    assert dict(one.category_names) == dict(other.category_names)
    assert (one.placeholder, one.unlisted) == (other.placeholder, other.unlisted)


@pytest.mark.parametrize("only", [None, {"a.png", "c.png"}], ids=["all", "some"])
@pytest.mark.parametrize("with_masks", [False, True], ids=["boxes", "masks"])
def test_the_first_and_the_second_start_equal_the_file(
    with_masks: bool, only: set[str] | None, write_annotations: Write, reads: list[Path]
) -> None:
    path = write_annotations(data())
    expected = read_annotations(path, with_masks=with_masks, only=only)
    for _ in range(3):
        opened = open_annotations(path, with_masks=with_masks, only=only)
        assert_same(expected, opened)
        assert not opened.boxes.flags.writeable
    assert len(reads) == 1


def test_masks_and_splits_are_stored_apart(write_annotations: Write, reads: list[Path]) -> None:
    path = write_annotations(data())
    choices = [(False, None), (True, None), (False, {"a.png"}), (False, {"d.png"})]
    for _ in range(2):
        opened = [open_annotations(path, with_masks=masks, only=only) for masks, only in choices]
        assert [len(one.image_ids) for one in opened] == [4, 4, 1, 1]
    assert len(reads) == 4


def test_small_files_are_not_stored(
    write_annotations: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_annotations(data())
    monkeypatch.setattr(coco_cache, "_SMALLEST", path.stat().st_size + 1)
    open_annotations(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_without_objects_is_stored(write_annotations: Write, reads: list[Path]) -> None:
    path = write_annotations(data(annotations=[]))
    for _ in range(2):
        opened = open_annotations(path, with_masks=True)
        assert opened.boxes.shape == (0, 4)
        assert list(opened.segmentations) == []
    assert len(reads) == 1


def test_a_changed_file_of_the_same_size_and_time_is_read_again(
    write_annotations: Write, reads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_annotations(data())
    open_annotations(path)
    status = path.stat()
    path.write_text(path.read_text().replace("a.png", "e.png"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert "e.png" in list(open_annotations(path).file_names)
    assert f"{STORED} belongs to other annotations, or to another version: it is" in caplog.text
    assert_same(read_annotations(path), open_annotations(path))
    assert len(reads) == 2


def test_a_file_of_another_version_is_rebuilt(
    write_annotations: Write, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_annotations(data())
    with monkeypatch.context() as older:
        older.setattr(coco_cache, "_FORMAT", 0)
        open_annotations(path)
    open_annotations(path)
    open_annotations(path)
    assert len(reads) == 2


def replace_member(path: Path, name: str, content: bytes | None, method: int = 0) -> None:
    """Replace or remove a member of a zip."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    members.pop(name)
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, data in (members | ({} if content is None else {name: content})).items():
            archive.writestr(member, data)


def flip(path: Path) -> None:
    """Change one bit of the last box."""
    content = bytearray(path.read_bytes())
    start = content.index(b"boxes.npy")
    header = content.index(b"\n", start)
    content[header + 20] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Remove the last 50 bytes."""
    path.write_bytes(path.read_bytes()[:-50])


def empty(path: Path) -> None:
    """Remove all content."""
    path.write_bytes(b"")


def foreign_text(path: Path) -> None:
    """Replace the file by a text."""
    path.write_text("not a zip at all")


def foreign_npz(path: Path) -> None:
    """Replace the file by arrays of another program."""
    with path.open("wb") as file:
        np.savez(file, boxes=np.zeros(3))


def objects(path: Path) -> None:
    """Store an array that only pickle can read."""
    with path.with_name("objects.npy").open("wb") as file:
        np.save(file, np.array([print], dtype=object), allow_pickle=True)
    replace_member(path, "areas.npy", path.with_name("objects.npy").read_bytes())


def no_array(path: Path) -> None:
    """Remove the areas."""
    replace_member(path, "areas.npy", None)


def huge(path: Path) -> None:
    """Claim a thousand billion boxes."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    replace_member(path, "boxes.npy", content)


def compressed(path: Path) -> None:
    """Compress the members."""
    replace_member(path, "areas.npy", None, zipfile.ZIP_DEFLATED)


def no_key(path: Path) -> None:
    """Store a header without a key."""
    replace_member(path, "header.json", b"[]")


@pytest.mark.parametrize(
    "damage",
    [flip, cut, empty, foreign_text, foreign_npz, objects, no_array, huge, compressed, no_key],
)
def test_a_damaged_or_foreign_file_is_rebuilt_with_a_message(
    damage: Callable[[Path], None],
    write_annotations: Write,
    reads: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_annotations(data())
    open_annotations(path)
    damage(path.parent / STORED)
    for _ in range(2):
        assert_same(read_annotations(path), open_annotations(path))
    assert len(reads) == 2
    assert caplog.text.count("is damaged or not a file of annotations") == 1
    assert "it is rebuilt" in caplog.text


def test_a_folder_that_cannot_be_written_is_replaced_by_the_cache(
    write_annotations: Write, reads: list[Path], cache: Path
) -> None:
    path = write_annotations(data())
    # chmod has no effect on root, the usual user in containers.
    (path.parent / STORED / "occupied").mkdir(parents=True)
    for _ in range(2):
        assert_same(read_annotations(path), open_annotations(path))
    assert len(list((cache / "irpe").glob(f"*-{STORED}"))) == 1
    assert len(reads) == 1


def test_annotations_that_cannot_be_stored_are_read_at_every_start(
    write_annotations: Write,
    reads: list[Path],
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write_annotations(data())
    (path.parent / STORED / "occupied").mkdir(parents=True)
    (cache / "irpe").write_text("not a folder")
    for _ in range(2):
        assert_same(read_annotations(path), open_annotations(path))
    assert len(reads) == 2
    assert f"{path} could not be stored: it is read at every start" in caplog.text


def test_messages_are_repeated_at_every_start(
    write_annotations: Write, reads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        *({"id": n, "name": f"c{n}", "supercategory": "pets"} for n in (3, 7, 40)),
    ]
    content = changed(bbox=[1, 2, 0, 3]) | {"categories": categories}
    content["annotations"].append({"image_id": 77, "category_id": 3, "bbox": [0, 0, 1, 1]})
    path = write_annotations(content)
    said = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            open_annotations(path)
        said.append({record.message for record in caplog.records if "stored" not in record.message})
    assert len(reads) == 1
    assert said[0] == said[1]
    assert said[0] == {
        "category 0 (pets) is a placeholder without objects: left out",
        f"{path}: 1 annotations belong to images that the file does not list",
        f"{path}: 1 boxes without width or height are left out",
    }


def test_an_invalid_file_is_an_error_at_every_start(write_annotations: Write) -> None:
    path = write_annotations(changed(category_id=4))
    for _ in range(2):
        with pytest.raises(DataError, match="category_id must be a category that the file lists"):
            open_annotations(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_text(json.dumps(data())[:-9])
    with pytest.raises(DataError, match="truncated, damaged or not JSON"):
        open_annotations(path)
    path.unlink()
    with pytest.raises(DataError, match="there is no annotation file"):
        open_annotations(path)


def test_only_one_of_several_processes_reads_the_file(
    write_annotations: Write, reads: list[Path]
) -> None:
    """The lock belongs to an open file, so threads are excluded like processes."""
    path = write_annotations(data())
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_annotations, [path] * 8))
    assert len(reads) == 1
    for one in opened:
        assert_same(read_annotations(path), one)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, STORED]


def test_a_file_that_changes_while_it_is_read_is_not_stored(
    write_annotations: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_annotations(data())

    def read(path: Path, **options: object) -> CocoAnnotations:
        path.write_text(json.dumps(data()) + " ")
        return read_annotations(path, **options)

    monkeypatch.setattr(coco_cache, "read_annotations", read)
    open_annotations(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_spawned_workers_map_the_stored_file(write_annotations: Write, reads: list[Path]) -> None:
    path = write_annotations(data(annotations=data()["annotations"] * 500))
    opened = open_annotations(path, with_masks=True)
    sent = pickle.dumps(opened)
    assert len(sent) < 2000
    assert_same(opened, pickle.loads(sent))
    # After the file is deleted, the mapped arrays remain, and workers get copies.
    (path.parent / "instances.json.masks.npz").unlink()
    copied = pickle.dumps(opened)
    assert len(copied) > 2000
    assert_same(opened, pickle.loads(copied))
    assert len(reads) == 1


def test_samples_of_stored_annotations_equal_those_of_the_file(
    pictures: Path, write_annotations: Write, reads: list[Path]
) -> None:
    path = write_annotations(data())
    first, second = (CocoImages(pictures, path, with_masks=True) for _ in range(2))
    assert len(reads) == 1
    for i in range(len(FILES)):
        (image, target), (other_image, other) = first[i], second[i]
        assert np.array_equal(image, other_image)
        assert list(target) == list(other)
        assert all(torch.equal(target[name], other[name]) for name in target)
