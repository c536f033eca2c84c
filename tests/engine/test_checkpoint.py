"""Checkpoints: written atomically, the right ones kept, errors in one sentence."""

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
    """An error that nothing catches."""


def crash(*args: object, **options: object) -> None:
    raise Crash


def test_a_saved_object_can_be_loaded_and_leaves_no_temporary_file(tmp_path):
    atomic_save({"n": 1, "w": torch.arange(5)}, tmp_path / "a.pth")
    assert torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["w"], torch.arange(5))
    assert names(tmp_path) == ["a.pth"]


@pytest.mark.parametrize(
    ("owner", "where"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"]
)
def test_a_crash_before_the_renaming_keeps_the_old_file(tmp_path, monkeypatch, owner, where):
    atomic_save({"n": 1}, tmp_path / "a.pth")
    monkeypatch.setattr(owner, where, crash)
    with pytest.raises(Crash):
        atomic_save({"n": 2}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth") == 1


def test_a_process_killed_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    atomic_save({"n": 1}, path)
    child = os.fork()
    if child == 0:  # The child is killed before it renames the new file.
        real = os.fsync
        os.fsync = lambda number: (real(number), os.kill(os.getpid(), signal.SIGKILL))
        atomic_save({"n": 2, "w": torch.zeros(1000)}, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert read(path) == 1
    assert len(names(tmp_path)) == 2  # The temporary file is left.
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


def test_a_full_disk_is_an_error_in_one_sentence_and_keeps_the_old_file(tmp_path):
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


def test_the_last_the_best_and_the_newest_numbered_checkpoints_are_kept(tmp_path):
    checkpoints = CheckpointDir(tmp_path, keep=2)
    for epoch in range(5):
        checkpoints.save({"n": epoch}, is_best=epoch == 1, epoch=epoch)
    checkpoints.save({"n": 99})  # Within an epoch: not numbered.
    assert names(tmp_path) == [
        "best_checkpoint.pth", "checkpoint.pth", "checkpoint_0003.pth", "checkpoint_0004.pth",
    ]  # fmt: skip
    assert read(tmp_path / "checkpoint.pth") == 99
    assert read(tmp_path / "best_checkpoint.pth") == 1
    assert read(tmp_path / "checkpoint_0003.pth") == 3
    assert checkpoints.latest() == tmp_path / "checkpoint.pth"


def test_only_what_the_run_wrote_is_deleted_by_epoch(tmp_path):
    foreign = ["checkpoint_9999.pth", "checkpoint_0_backup.pth", "checkpoint_0001_old.pth"]
    for name in [*foreign, "checkpoint_00000.pth", "checkpoint_0002.pth"]:
        (tmp_path / name).touch()
    checkpoints = CheckpointDir(tmp_path, keep=1)
    for epoch in range(2):
        checkpoints.save({"n": epoch}, epoch=epoch)
        # A clock that jumps backwards changes nothing.
        os.utime(tmp_path / f"checkpoint_000{epoch}.pth", (1e9 - epoch, 1e9 - epoch))
    kept = {*foreign, "checkpoint_00000.pth", "checkpoint_0002.pth", "checkpoint_0001.pth"}
    assert set(names(tmp_path)) == kept | {"checkpoint.pth"}
    assert checkpoints.numbered() == [1, 2, 9999]


def test_a_resumed_run_deletes_its_own_earlier_checkpoints(tmp_path):
    for epoch in range(3):
        CheckpointDir(tmp_path, keep=3, first_epoch=epoch).save({"n": epoch}, epoch=epoch)
    (tmp_path / "checkpoint_0009.pth").touch()
    CheckpointDir(tmp_path, keep=2, first_epoch=3).save({"n": 3}, epoch=3)
    assert CheckpointDir(tmp_path).numbered() == [2, 3, 9]


def test_a_new_run_in_an_old_folder_keeps_its_own_checkpoints(tmp_path):
    for epoch in (298, 299):
        (tmp_path / f"checkpoint_0{epoch}.pth").touch()
    CheckpointDir(tmp_path, keep=2).save({"n": 1}, epoch=0)
    assert CheckpointDir(tmp_path).numbered() == [0, 298, 299]


def test_no_numbered_checkpoint_is_written_if_none_is_kept(tmp_path):
    CheckpointDir(tmp_path, keep=0).save({"n": 1}, epoch=0)
    assert names(tmp_path) == ["checkpoint.pth"]


def test_the_state_is_serialized_once_for_all_names(tmp_path, monkeypatch):
    saves = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (saves.append(1), save(*args)))
    CheckpointDir(tmp_path, keep=1).save({"n": 1}, is_best=True, epoch=0)
    assert len(saves) == 1
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 1
    assert len(names(tmp_path)) == 3


def test_files_are_copied_on_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    CheckpointDir(tmp_path, keep=1).save({"n": 1}, is_best=True, epoch=0)
    assert [read(path) for path in tmp_path.iterdir()] == [1, 1, 1]
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 3


def test_the_best_checkpoint_is_renamed_before_the_last_one(tmp_path, monkeypatch):
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


def test_latest_is_none_before_the_first_checkpoint(tmp_path):
    assert CheckpointDir(tmp_path).latest() is None


def test_a_negative_number_of_checkpoints_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 0, got -1"):
        CheckpointDir(tmp_path, keep=-1)


def test_a_missing_folder_is_created(tmp_path):
    assert check_writable(tmp_path / "a" / "b").is_dir()
    assert names(tmp_path / "a" / "b") == []


def test_a_file_at_the_path_of_the_folder_is_an_error_in_one_sentence(tmp_path):
    (tmp_path / "out").write_text("some text")
    with pytest.raises(UserError, match=r"cannot write to .*out: File exists"):
        check_writable(tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot write to .*deeper: Not a directory"):
        check_writable(tmp_path / "out" / "deeper")
    with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pth: Not a directory"):
        CheckpointDir(tmp_path / "out").save({"n": 1})


def test_a_read_only_folder_is_an_error_in_one_sentence(tmp_path, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)  # File permissions do not apply to root.
    with pytest.raises(UserError, match=r"cannot write to .*: Read-only file system") as caught:
        check_writable(tmp_path)
    assert caught.value.exit_code == 1
