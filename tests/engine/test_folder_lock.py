"""Two runs do not share an output folder; a run that is gone does not keep it."""

import errno
import fcntl
import os
import signal

import pytest

from engine import UserError
from engine.folder_lock import lock_folder
from tests.engine.launch import start
from tests.engine.toy import ToyConfig, train


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    flags = ["--output-dir", str(tmp_path), "--num-workers", "2", "--pause", "0.3"]
    run = start("tests.engine.toy", *flags)
    try:
        while "epoch 0 3/" not in run.stdout.readline():
            assert run.poll() is None, run.stderr.read()
        before = sorted(path.name for path in tmp_path.iterdir())
        for options in ({}, {"overwrite": True}):
            config = ToyConfig(output_dir=str(tmp_path), **options)
            with pytest.raises(UserError, match=rf"in use by another run \(process {run.pid} on "):
                train(config)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        # Its workers may still run.
        assert train(ToyConfig(output_dir=str(tmp_path), epochs=1))["epoch"] == 0
    finally:
        run.kill()
        run.communicate()


def test_an_evaluation_needs_no_lock(tmp_path):
    with pytest.raises(UserError, match="has no --eval"):
        train(ToyConfig(output_dir=str(tmp_path), eval=True))
    assert not (tmp_path / ".run.lock").exists()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert lock_folder(tmp_path) is None
    assert "No locks available" in caplog.text


def test_a_link_or_folder_named_like_the_lock_is_an_error(tmp_path):
    (tmp_path / ".run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"cannot write .*\.run\.lock: Too many levels of symbolic"):
        lock_folder(tmp_path)
    assert not (tmp_path / "precious").exists()
    (tmp_path / ".run.lock").unlink()
    (tmp_path / ".run.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*\.run\.lock: Is a directory"):
        lock_folder(tmp_path)
