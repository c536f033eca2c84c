"""Tests of `TarArchive`: content of members, the stored index, errors for damaged files."""

import copy
import gzip
import os
import pickle
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from datasets import DataError, TarArchive, TarImages, archive_index, archives
from datasets.archive_index import ArchiveIndex, save_index, signature_of
from datasets.packed_strings import PackedStrings

WriteTar = Callable[..., Path]


def noise(count: int) -> dict[str, bytes]:
    """Return `count` different members with sizes of 1 to 9,000 bytes."""
    draw = np.random.RandomState(0)
    return {f"{i % 5}/{i:04d}.bin": draw.bytes(1 + draw.randint(9000)) for i in range(count)}


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """List of the archives that were scanned so far."""
    seen: list[Path] = []
    scan = archives.scan_tar

    def counting(path: Path) -> dict[str, tuple[int, int]]:
        seen.append(path)
        return scan(path)

    monkeypatch.setattr(archives, "scan_tar", counting)
    return seen


@pytest.mark.parametrize(
    "options",
    [{"format": tarfile.USTAR_FORMAT}, {"format": tarfile.GNU_FORMAT}, {}],
    ids=["ustar", "gnu", "pax"],
)
def test_members_are_found_by_name(
    options: dict[str, int], write_tar: WriteTar, tmp_path: Path
) -> None:
    long = "folder/" + 40 * "ü"
    if options.get("format") != tarfile.USTAR_FORMAT:
        long += 100 * "ü"
    files = {"b.bin": b"bb", "./a/../c.bin": b"c", "empty": b"", long: b"long"}
    archive = TarArchive(write_tar(tmp_path / "x.tar", files, **options))
    assert list(archive.names) == sorted(archive.names)
    assert len(archive) == len(files)
    assert archive.read("c.bin") == b"c"
    assert archive.read("empty") == b""
    assert archive.read(long) == b"long"
    with pytest.raises(DataError, match=r"no member 'a\.bin'"):
        archive.read("a.bin")


def test_the_last_of_equal_names_is_used_and_hard_links_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    (tmp_path / "one").write_bytes(b"first")
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "one", "a")
        (tmp_path / "one").write_bytes(b"second!")
        tar.add(tmp_path / "one", "a")
        link = tarfile.TarInfo("b")
        link.type, link.linkname = tarfile.LNKTYPE, "a"
        tar.addfile(link)
        link.name, link.type = "c", tarfile.SYMTYPE
        tar.addfile(link)
    archive = TarArchive(path)
    assert {name: archive.read(name) for name in archive.names} == {
        "a": b"second!",
        "b": b"second!",
    }


def test_the_index_is_built_once(write_tar: WriteTar, tmp_path: Path, scans: list[Path]) -> None:
    files = noise(7)
    path = write_tar(tmp_path / "train.tar", files)
    for _ in range(3):
        archive = TarArchive(path)
        assert {name: archive.read(name) for name in archive.names} == files
    assert scans == [path]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.tar", "train.tar.index.npz"]


def test_the_index_is_rebuilt_when_the_archive_changes(
    write_tar: WriteTar, tmp_path: Path, scans: list[Path]
) -> None:
    path = write_tar(tmp_path / "train.tar", {"a": b"1", "b": b"2"})
    TarArchive(path)
    write_tar(path, {"b": b"3", "c": b"4"})
    # The size is the same, so only the modification time differs.
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    archive = TarArchive(path)
    assert {name: archive.read(name) for name in archive.names} == {"b": b"3", "c": b"4"}
    assert len(scans) == 2


def test_several_threads_can_index_an_archive_at_the_same_time(
    write_tar: WriteTar, tmp_path: Path
) -> None:
    files = noise(211)
    path = write_tar(tmp_path / "train.tar", files)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(TarArchive, [path] * 8))
    opened.append(TarArchive(path))
    assert all({name: one.read(name) for name in one.names} == files for one in opened)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.tar", "train.tar.index.npz"]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "older_format"])
def test_a_damaged_index_is_rebuilt(
    damage: str,
    write_tar: WriteTar,
    tmp_path: Path,
    scans: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_tar(tmp_path / "train.tar", noise(5))
    with monkeypatch.context() as older:
        if damage == "older_format":
            older.setattr(archive_index, "_FORMAT", 0)
        TarArchive(path)
    index = tmp_path / "train.tar.index.npz"
    if damage == "cut":
        index.write_bytes(index.read_bytes()[:-50])
    elif damage == "noise":
        index.write_bytes(b"no index at all")
    elif damage == "empty":
        index.write_bytes(b"")
    assert len(TarArchive(path)) == 5
    assert len(TarArchive(path)) == 5
    assert len(scans) == 2


def test_an_archive_in_a_read_only_folder_is_indexed_in_the_cache(
    write_tar: WriteTar,
    tmp_path: Path,
    cache: Path,
    scans: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # chmod has no effect on root, the usual user in containers.
    save = archive_index.save_index

    def read_only(index: ArchiveIndex, index_path: Path) -> None:
        if index_path.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        save(index, index_path)

    monkeypatch.setattr(archive_index, "save_index", read_only)
    path = write_tar(tmp_path / "train.tar", noise(5))
    TarArchive(path)
    assert [p.name for p in tmp_path.iterdir()] == ["train.tar"]
    assert len(list((cache / "irpe").glob("*-train.tar.index.npz"))) == 1
    assert len(TarArchive(path)) == 5
    assert len(scans) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_folder_without_write_permission_is_not_changed(
    write_tar: WriteTar, tmp_path: Path, cache: Path
) -> None:
    path = write_tar(tmp_path / "shared" / "train.tar", noise(5))
    path.parent.chmod(0o555)
    try:
        TarArchive(path)
        assert [p.name for p in path.parent.iterdir()] == ["train.tar"]
        assert len(list((cache / "irpe").iterdir())) == 1
    finally:
        path.parent.chmod(0o755)


def test_an_index_that_cannot_be_stored_is_not_an_error(
    write_tar: WriteTar,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(index: ArchiveIndex, index_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_index, "save_index", fail)
    files = noise(3)
    archive = TarArchive(write_tar(tmp_path / "train.tar", files))
    assert archive.read("1/0001.bin") == files["1/0001.bin"]
    assert "could not be stored" in caplog.text


def test_a_failed_save_keeps_the_old_index(
    write_tar: WriteTar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "train.tar", noise(3))
    index = TarArchive(path)._index
    index_path = tmp_path / "train.tar.index.npz"
    before = index_path.read_bytes()

    def half(file: object, **arrays: np.ndarray) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_index.np, "savez", half)
    with pytest.raises(OSError, match="No space"):
        save_index(index, index_path)
    assert index_path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.tar", "train.tar.index.npz"]


def test_an_indexed_archive_of_a_million_members_opens_in_seconds(tmp_path: Path) -> None:
    count = 1_000_000
    path = tmp_path / "train.tar"
    path.touch()
    os.truncate(path, 2 * count)  # Its content is never read.
    names = [f"n{i // 1000:08d}/n{i // 1000:08d}_{i:08d}.JPEG" for i in range(count)]
    offsets = np.arange(count, dtype=np.int64)
    signature = signature_of(path.stat())
    index = ArchiveIndex(PackedStrings.pack(names), offsets, offsets, signature)
    save_index(index, tmp_path / "train.tar.index.npz")

    # CPU time, because other processes may slow down the machine.
    start = time.process_time()
    archive = TarArchive(path)
    assert archive._index.find(names[123_456]) == 123_456
    assert time.process_time() - start < 2
    images = TarImages(path)
    assert time.process_time() - start < 5
    assert len(images) == count
    assert len(images.classes) == 1000
    assert images.targets[123_456] == 123


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_its_own_descriptor(
    clone: Callable[[TarArchive], TarArchive], write_tar: WriteTar, tmp_path: Path
) -> None:
    files = noise(5)
    archive = TarArchive(write_tar(tmp_path / "train.tar", files))
    archive.read_at(0)
    twin = clone(archive)
    del archive
    assert [twin.read_at(i) for i in range(5)] == [files[name] for name in twin.names]


def test_the_descriptor_is_closed_with_the_archive(write_tar: WriteTar, tmp_path: Path) -> None:
    archive = TarArchive(write_tar(tmp_path / "train.tar", noise(5)))
    archive.read_at(0)
    descriptor = archive._descriptor
    del archive
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_an_archive_replaced_while_in_use_is_refused_by_workers_started_later(
    write_tar: WriteTar, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "train.tar", noise(5))
    archive = TarArchive(path)
    first = archive.read_at(0)
    write_tar(tmp_path / "new.tar", noise(9)).replace(path)
    assert archive.read_at(0) == first
    with pytest.raises(DataError, match="changed while it was in use"):
        pickle.loads(pickle.dumps(archive)).read_at(0)


def _cut(content: bytes, at: int) -> bytes:
    return content[:at]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        # A member has a header of 512 bytes and 1,024 bytes of content.
        (lambda tar: _cut(tar, 2 * 1536 + 700), "truncated"),
        (lambda tar: _cut(tar, 2 * 1536 + 100), "truncated"),
        (lambda tar: _cut(tar, 2 * 1536), "truncated"),
        (lambda tar: _cut(tar, 100), "truncated"),
        (lambda tar: tar[:1536] + bytes([tar[1536] ^ 255]) + tar[1537:], "damaged at byte 1536"),
        (lambda tar: b"", "not a tar"),
        (lambda tar: b"just text, " * 200, "not a tar"),
        (gzip.compress, "compressed .gzip.*decompress"),
    ],
    ids=[
        "in_content",
        "in_header",
        "between_members",
        "in_first_header",
        "header_damaged",
        "empty",
        "text",
        "compressed",
    ],
)
def test_a_damaged_archive_is_reported_in_one_sentence(
    damage: Callable[[bytes], bytes], message: str, write_tar: WriteTar, tmp_path: Path
) -> None:
    path = write_tar(
        tmp_path / "train.tar",
        {name: bytes(1000) for name in "abcd"},
        format=tarfile.USTAR_FORMAT,
    )
    assert len(TarArchive(path)) == 4
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        TarArchive(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": np.array([10])},
        {"sizes": np.array([10.0, 10.0])},
        {"sizes": np.array([-1, 10])},
        {"sizes": np.array([2**62, 10])},
        {"offsets": np.array([2**62, 512])},
        {"offsets": np.array([[512, 512]])},
        {"format": np.array([1, 1])},
        {"names": np.zeros((2, 2))},
    ],
    ids=lambda change: "-".join(change),
)
def test_an_index_that_does_not_fit_its_archive_is_built_again(change, write_tar, tmp_path) -> None:
    path = write_tar(tmp_path / "train.tar", {"a": b"first", "b": b"second"})
    TarArchive(path)
    index = tmp_path / "train.tar.index.npz"
    with np.load(index) as stored:
        arrays = dict(stored)
    np.savez(index, **(arrays | change))
    assert TarArchive(path).read("b") == b"second"
    with np.load(index) as stored:
        assert {name: stored[name].tolist() for name in arrays} == {
            name: array.tolist() for name, array in arrays.items()
        }


def test_a_pipe_as_index_is_not_read(write_tar, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train.tar", {"a": b"first"})
    os.mkfifo(tmp_path / "train.tar.index.npz")
    assert TarArchive(path).read("a") == b"first"


def test_extended_headers_with_text_as_numbers_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a")
        member.pax_headers = {"GNU.sparse.major": "x", "GNU.sparse.minor": "0"}
        member.pax_headers |= {"GNU.sparse.realsize": "x"}
        tar.addfile(member)
    with pytest.raises(DataError, match=r"train\.tar is truncated, damaged or not a tar"):
        TarArchive(path)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_missing_archive_is_reported(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=r"no archive at .*train\.tar"):
        TarArchive(path)


@pytest.mark.parametrize("strings", [[], ["a"], ["", "a", "", "ü/\udcff.jpg", "b" * 999]])
def test_packed_strings_equal_the_strings(strings: list[str]) -> None:
    packed = PackedStrings.pack(strings)
    assert list(packed) == strings
    assert [packed[i] for i in range(len(strings))] == strings
    assert [packed[i - len(strings)] for i in range(len(strings))] == strings
    for outside in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            packed[outside]
