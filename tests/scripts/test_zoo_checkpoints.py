"""Checkpoints of the zoo, downloaded into the cache from their URL or from a mirror."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import UserError
from irpe_core import CheckpointError
from scripts.zoo.__main__ import main
from scripts.zoo.checkpoints import fetch
from tests.scripts.small_zoo import make_zoo


def test_download_continues_after_a_failure(site, cache, tmp_path, capsys):
    wrong = {"checkpoint": site.url("wrong.pth"), "sha256": "0" * 64}
    zoo = make_zoo(tmp_path, site.address, gone={"checkpoint": site.url("gone.pth")}, wrong=wrong)
    site.files["/wrong.pth"] = b"something else"
    with pytest.raises(UserError, match=r"^not downloaded: gone, wrong$"):
        main(["download", "--zoo", str(zoo.file)])
    printed = capsys.readouterr()
    assert f"scenes: {cache / 'scenes.pth'}\n" in printed.out
    assert "404" in printed.err
    assert "0" * 64 in printed.err
    assert {path.name for path in cache.glob("*.pth")} == {"digits.pth", "scenes.pth"}
    asked = len(site.requests)
    main(["download", "--zoo", str(zoo.file), "--rows", "digits", "detection"])
    assert len(site.requests) == asked


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_mirror_replaces_the_published_url(kind, checkpoints, site, cache, tmp_path):
    zoo = make_zoo(tmp_path, "http://127.0.0.1:1/release")
    for name, content in checkpoints.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    mirror = {"folder": str(tmp_path), "url": f"{site.address}/"}[kind]
    main(["download", "--zoo", str(zoo.file), "--mirror", mirror])
    assert {path.name: path.read_bytes() for path in cache.glob("*.pth")} == {
        f"{name}.pth": content for name, content in checkpoints.items()
    }


def full_disk(source: Path, target: Path) -> None:
    target.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


@pytest.mark.parametrize(
    ("content", "copy", "words"),
    [
        (None, shutil.copyfile, "does not exist"),
        (b"other", shutil.copyfile, "SHA-256 of .* must be 0000.*, got d9298a10"),
        (b"", full_disk, "No space left on device"),
    ],
    ids=["missing", "wrong-checksum", "full-disk"],
)
def test_a_failed_copy_from_a_folder_leaves_nothing_in_the_cache(
    content, copy: Callable, words, cache, tmp_path, monkeypatch
):
    sha256 = "0" * 64 if content else None
    zoo = make_zoo(
        tmp_path, "http://nowhere", digits={"checkpoint": "http://x/a.pth", "sha256": sha256}
    )
    if content is not None:
        (tmp_path / "a.pth").write_bytes(content)
    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(CheckpointError, match=words):
        fetch(zoo.rows[0], str(tmp_path))
    assert not cache.exists() or not list(cache.iterdir())


def test_concurrent_copies_from_a_folder_do_not_share_a_file(
    checkpoints, cache, tmp_path, monkeypatch
):
    row = make_zoo(tmp_path, "http://nowhere").rows[0]
    (tmp_path / "digits.pth").write_bytes(checkpoints["digits"])
    copy, places = shutil.copyfile, []

    def slow_copy(source: Path, target: Path) -> Path:
        places.append(target)
        if len(places) == 1:  # another call starts and ends during this one
            assert fetch(row, str(tmp_path)).read_bytes() == checkpoints["digits"]
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", slow_copy)
    fetch(row, str(tmp_path))
    assert len(set(places)) == 2
    assert {p.name: p.read_bytes() for p in cache.glob("*.pth")} == {
        "digits.pth": checkpoints["digits"]
    }
