"""Tests of `ZipArchive`: content of members, forked and spawned workers, damaged files."""

import multiprocessing
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets import CorruptImageError, DataError, ZipArchive, archives
from tests.datasets.zip_reader import answer, answer_forked, read_all

WriteZip = Callable[..., Path]


def noise(count: int) -> dict[str, bytes]:
    """Return `count` different members with sizes of 1 to 9,000 bytes."""
    draw = np.random.RandomState(0)
    return {f"{i % 5}/{i:04d}.bin": draw.bytes(1 + draw.randint(9000)) for i in range(count)}


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"]
)
def test_members_are_found_by_name(method: int, write_zip: WriteZip, tmp_path: Path) -> None:
    files = {"b.bin": b"b" * 9999, "./a/../c.bin": b"c", "empty": b"", "f/" + 99 * "ü": b"long"}
    archive = ZipArchive(write_zip(tmp_path / "x.zip", files, method))
    assert list(archive.names) == ["b.bin", "c.bin", "empty", "f/" + 99 * "ü"]
    assert len(archive) == 4
    assert [archive.read_at(i) for i in range(4)] == [b"b" * 9999, b"c", b"", b"long"]
    assert archive.read("c.bin") == b"c"
    with pytest.raises(DataError, match=r"x\.zip has no member 'a\.bin'"):
        archive.read("a.bin")


def test_a_zip_of_another_tool_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        file.write(b"#!/bin/sh, as in a self-extracting archive\n")
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("folder/", b"")
            link = zipfile.ZipInfo("link")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "folder/a")
            # Only the local header has the extra field; the sizes follow the content.
            extra = zipfile.ZipInfo("folder/a")
            extra.extra = b"UT\x05\x00\x01" + bytes(4)
            with archive.open(extra, "w", force_zip64=True) as member:
                member.write(b"first")
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("folder/a", b"second!")
            archive.writestr("folder/b", b"packed " * 99, zipfile.ZIP_DEFLATED)
    archive = ZipArchive(path)
    assert list(archive.names) == ["folder/a", "folder/b"]
    assert archive.read("folder/a") == b"second!"
    assert archive.read("folder/b") == b"packed " * 99


def test_sizes_after_the_content_are_read_from_the_directory(tmp_path: Path) -> None:
    class Pipe:
        """A file that cannot seek: local headers are written before the sizes are known."""

        def __init__(self, file: Any) -> None:
            self.write, self.flush = file.write, file.flush

    files = noise(9)
    with (tmp_path / "x.zip").open("wb") as file, zipfile.ZipFile(Pipe(file), "w") as archive:
        for i, (name, content) in enumerate(files.items()):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    assert read_all(ZipArchive(tmp_path / "x.zip"), 0, 1) == files


def test_the_directory_is_read_once(
    write_zip: WriteZip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path / "train2017.zip", noise(7))
    ZipArchive(path)
    monkeypatch.setattr(archives, "scan_zip", None)
    assert read_all(ZipArchive(path), 0, 1) == noise(7)
    assert (tmp_path / "train2017.zip.index.npz").is_file()


def test_four_forked_and_four_spawned_workers_read_all_bytes_correctly(
    write_zip: WriteZip, tmp_path: Path
) -> None:
    files = noise(101)
    archive = ZipArchive(write_zip(tmp_path / "train.zip", files))
    # Open the file before the workers start. With one shared file position, they would read wrong
    # bytes.
    assert read_all(archive, 0, 1) == files
    spawn, fork = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")
    barrier, answers = spawn.Barrier(9), spawn.SimpleQueue()
    workers = [
        context.Process(target=target, args=(source, seed, barrier, answers), daemon=True)
        for seed, (context, target, source) in enumerate(
            [(spawn, answer, pickle.dumps(archive))] * 4 + [(fork, answer_forked, archive)] * 4
        )
    ]
    for worker in workers:
        worker.start()
    barrier.wait(120)
    here = read_all(archive, 8, rounds=40)
    contents = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert all(content == files for content in [here, *contents])


def test_a_copy_has_its_own_descriptor(write_zip: WriteZip, tmp_path: Path) -> None:
    archive = ZipArchive(write_zip(tmp_path / "train.zip", noise(5)))
    archive.read_at(0)
    twin = pickle.loads(pickle.dumps(archive))
    del archive
    assert read_all(twin, 0, 1) == noise(5)


def test_an_archive_replaced_while_in_use_is_refused_by_workers_started_later(
    write_zip: WriteZip, tmp_path: Path
) -> None:
    path = write_zip(tmp_path / "train.zip", noise(5))
    archive = ZipArchive(path)
    first = archive.read_at(0)
    write_zip(tmp_path / "new.zip", noise(9)).replace(path)
    assert archive.read_at(0) == first
    with pytest.raises(DataError, match="changed while it was in use"):
        pickle.loads(pickle.dumps(archive)).read_at(0)


def _encrypted(content: bytes) -> bytes:
    """Set the encryption flag in the first entry of the directory."""
    at = content.index(b"PK\x01\x02") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "truncated"),
        (lambda content: content[:-60], "truncated"),
        (lambda content: content[:2000], "truncated"),
        (lambda content: content[1500:], "damaged"),
        (lambda content: b"", "not a zip"),
        (lambda content: b"just text, " * 200, "not a zip"),
        (_encrypted, "a is encrypted"),
    ],
    ids=["last_byte", "in_directory", "in_content", "no_beginning", "empty", "text", "encrypted"],
)
def test_a_damaged_archive_is_reported_in_one_sentence(
    damage: Callable[[bytes], bytes], message: str, write_zip: WriteZip, tmp_path: Path
) -> None:
    path = write_zip(tmp_path / "train.zip", {name: bytes(1000) for name in "abcd"})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        ZipArchive(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unsupported_compression_is_reported(write_zip: WriteZip, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "train.zip", {"a": bytes(99)}, zipfile.ZIP_BZIP2)
    with pytest.raises(
        DataError, match=r"train\.zip: a is compressed with bzip2, which is not sup"
    ):
        ZipArchive(path)


@pytest.mark.parametrize("damage", ["header", "content"])
def test_one_damaged_member_does_not_affect_the_others(
    damage: str, write_zip: WriteZip, tmp_path: Path
) -> None:
    files = {name: os.urandom(99) for name in "abc"}
    path = write_zip(tmp_path / "train.zip", files, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x03\x04", 1)
    if damage == "content":
        at += 30 + len("b")
    content[at : at + 4] = b"\xff" * 4
    path.write_bytes(content)
    archive = ZipArchive(path)
    assert (archive.read("a"), archive.read("c")) == (files["a"], files["c"])
    with pytest.raises(CorruptImageError, match=r"train\.zip: b is damaged"):
        archive.read("b")


def test_a_missing_archive_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no archive at .*train\.zip"):
        ZipArchive(tmp_path / "train.zip")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (zipfile.ZIP_STORED, "it has more than 1,000"),
        (zipfile.ZIP_DEFLATED, "it unpacks to more than 1,000"),
    ],
    ids=["stored", "deflated"],
)
def test_a_member_larger_than_any_image_is_refused(
    method: int, message: str, write_zip: WriteZip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_LARGEST_MEMBER", 1000)
    files = {"bomb.png": bytes(1001), "image.png": bytes(1000)}
    archive = ZipArchive(write_zip(tmp_path / "x.zip", files, method))
    assert archive.read("image.png") == bytes(1000)
    with pytest.raises(CorruptImageError, match=rf"bomb\.png is damaged: {message}"):
        archive.read("bomb.png")


def test_a_small_zip_of_gigabytes_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb.png", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CorruptImageError, match="unpacks to more than 268,435,456 bytes"):
        ZipArchive(path).read("bomb.png")
