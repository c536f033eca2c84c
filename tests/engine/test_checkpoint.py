"""Checkpoints: whole or not at all, the right ones kept, failures said in one sentence."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from engine import CheckpointDir, UserError, atomic_save, check_writable


def read(path: Path) -> int:
    return torch.load(path, weights_only=True)["n"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Crash(BaseException):
    """Stands for whatever kills a process."""


def crash(*args: object, **options: object) -> None:
    raise Crash


def test_a_saved_object_comes_back_and_leaves_no_temporary_file(tmp_path):
    atomic_save({"n": 1, "w": torch.arange(5)}, tmp_path / "a.pth")
    assert torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["w"], torch.arange(5))
    assert names(tmp_path) == ["a.pth"]


@pytest.mark.parametrize(
    ("owner", "where"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"]
)
def test_a_crash_before_the_renaming_leaves_the_old_file_whole(tmp_path, monkeypatch, owner, where):
    atomic_save({"n": 1}, tmp_path / "a.pth")
    monkeypatch.setattr(owner, where, crash)
    with pytest.raises(Crash):
        atomic_save({"n": 2}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth") == 1


def test_a_process_killed_while_writing_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.pth"
    atomic_save({"n": 1}, path)
    child = os.fork()
    if child == 0:  # dies with half of the new file on the disk
        real = os.fsync
        os.fsync = lambda number: (real(number), os.kill(os.getpid(), signal.SIGKILL))
        atomic_save({"n": 2, "w": torch.zeros(1000)}, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert read(path) == 1
    assert len(names(tmp_path)) == 2  # what it left behind
    atomic_save({"n": 3}, path)
    assert read(path) == 3
    assert names(tmp_path) == ["a.pth"]


def test_the_file_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), fsync(number)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    atomic_save({"n": 1}, tmp_path / "a.pth")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path):
    atomic_save({"n": 1}, tmp_path / "a.pth")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(UserError, match=r"cannot write .*a\.pth: File too large"):
            atomic_save({"n": 2, "w": torch.zeros(10**6)}, tmp_path / "a.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read(tmp_path / "a.pth") == 1
    assert names(tmp_path) == ["a.pth"]


def test_last_best_and_the_newest_few_are_kept(tmp_path):
    checkpoints = CheckpointDir(tmp_path, keep=2)
    for epoch in range(5):
        checkpoints.save({"n": epoch}, is_best=epoch == 1, epoch=epoch)
    checkpoints.save({"n": 99})  # in mid-epoch: no number
    assert names(tmp_path) == [
        "best_checkpoint.pth", "checkpoint.pth", "checkpoint_0003.pth", "checkpoint_0004.pth",
    ]  # fmt: skip
    assert read(tmp_path / "checkpoint.pth") == 99
    assert read(tmp_path / "best_checkpoint.pth") == 1
    assert read(tmp_path / "checkpoint_0003.pth") == 3
    assert checkpoints.latest() == tmp_path / "checkpoint.pth"


def test_a_new_run_in_an_old_directory_keeps_its_own_checkpoints(tmp_path):
    for epoch in (298, 299):
        path = tmp_path / f"checkpoint_0{epoch}.pth"
        path.touch()
        os.utime(path, (1e9 + epoch, 1e9 + epoch))
    CheckpointDir(tmp_path, keep=2).save({"n": 1}, epoch=0)
    assert [path.name for path in CheckpointDir(tmp_path).numbered()] == [
        "checkpoint_0299.pth", "checkpoint_0000.pth",
    ]  # fmt: skip


def test_no_number_is_written_when_none_is_kept(tmp_path):
    CheckpointDir(tmp_path, keep=0).save({"n": 1}, epoch=0)
    assert names(tmp_path) == ["checkpoint.pth"]


def test_the_state_is_serialised_once_for_all_names(tmp_path, monkeypatch):
    saves = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (saves.append(1), save(*args)))
    CheckpointDir(tmp_path, keep=1).save({"n": 1}, is_best=True, epoch=0)
    assert len(saves) == 1
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 1
    assert len(names(tmp_path)) == 3


def test_files_are_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    CheckpointDir(tmp_path, keep=1).save({"n": 1}, is_best=True, epoch=0)
    assert [read(path) for path in tmp_path.iterdir()] == [1, 1, 1]
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 3


def test_a_crash_between_best_and_last_leaves_no_last_that_misses_its_best(tmp_path, monkeypatch):
    checkpoints = CheckpointDir(tmp_path)
    checkpoints.save({"n": 1}, is_best=True)
    replace = Path.replace

    def crash_at_last(source: Path, target: Path) -> None:
        if target.name == "checkpoint.pth":
            raise Crash
        replace(source, target)

    monkeypatch.setattr(Path, "replace", crash_at_last)
    with pytest.raises(Crash):
        checkpoints.save({"n": 2}, is_best=True)
    assert read(tmp_path / "checkpoint.pth") == 1
    assert read(tmp_path / "best_checkpoint.pth") == 2


def test_there_is_no_latest_checkpoint_before_the_first(tmp_path):
    assert CheckpointDir(tmp_path).latest() is None


def test_a_negative_number_to_keep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is -1"):
        CheckpointDir(tmp_path, keep=-1)


def test_a_missing_directory_is_made(tmp_path):
    assert check_writable(tmp_path / "a" / "b").is_dir()
    assert names(tmp_path / "a" / "b") == []


def test_a_file_in_place_of_the_directory_is_one_sentence(tmp_path):
    (tmp_path / "out").write_text("I was here first")
    with pytest.raises(UserError, match=r"cannot write to .*out: File exists"):
        check_writable(tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot write to .*deeper: Not a directory"):
        check_writable(tmp_path / "out" / "deeper")
    with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pth: Not a directory"):
        CheckpointDir(tmp_path / "out").save({"n": 1})


def test_a_read_only_directory_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)  # permissions do not hold root back
    with pytest.raises(UserError, match=r"cannot write to .*: Read-only file system") as caught:
        check_writable(tmp_path)
    assert caught.value.exit_code == 1
