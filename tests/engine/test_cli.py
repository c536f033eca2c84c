"""The frame of a command: one line and the right exit code for errors that the user can fix."""

import os

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.utils.data import DataLoader, Dataset

from engine import Stopped, UsageError, UserError, cli
from tests.engine.launch import start


class BrokenDataError(Exception):
    """An error of a package that does not import engine."""


class Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise BrokenDataError(f"image {index}: cannot be read")


def exit_code_of(error: BaseException | None, *expected: type[Exception]) -> int:
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, *expected)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("no\n  space  left"), 1, "error: no space left\n"),
        (UsageError("no such flag"), 2, "error: no such flag\n"),
        (BrokenDataError("bad image"), 1, "error: bad image\n"),
        (BrokenDataError(), 1, "error: BrokenDataError\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (Stopped(143), 143, ""),
        (SystemExit(2), 2, ""),
    ],
    ids=["none", "user", "usage", "expected", "no message", "interrupt", "stopped", "exit"],
)
def test_an_error_becomes_one_line_and_an_exit_code(capsys, error, code, line):
    assert exit_code_of(error, BrokenDataError) == code
    assert capsys.readouterr().err == line


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)
    with pytest.raises(BrokenDataError):
        cli.run(lambda: next(iter(Broken())))


def test_an_error_of_a_loader_worker_has_no_traceback(capsys):
    batches = iter(DataLoader(Broken(), num_workers=1))
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: next(batches), BrokenDataError)
    batches._shutdown_workers()  # Without this call torch waits five seconds for them.
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: image 0: cannot be read\n"


@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        (["--batch-sise", "3"], 2, "error: unknown flag --batch-sise: did you mean --batch-size?"),
        (["--nan-at", "17"], 1, "error: the loss is nan at epoch 0, step 6: the batch itself"),
    ],
    ids=["usage", "failure"],
)
def test_a_failing_command_prints_one_line_on_stderr(flags, code, line):
    run = start("tests.engine.toy", *flags)
    _, err = run.communicate(timeout=60)
    assert run.returncode == code
    assert err.count("\n") == 1, err
    assert err.startswith(line)


def test_each_of_two_processes_prints_its_error(pair):
    assert pair.codes == [1, 1]
    for rank in range(2):
        last = pair.stderr[rank].splitlines()[-1]
        assert last == f"error [rank {rank}]: both fail"
        assert "Traceback" not in pair.stderr[rank]


def test_another_broken_pipe_keeps_its_traceback():
    def write_to_a_closed_pipe() -> None:
        read, write = os.pipe()
        os.close(read)
        os.write(write, b"text")

    with pytest.raises(BrokenPipeError):
        cli.run(write_to_a_closed_pipe)


class DamagedError(Exception):
    """An error of a package that does not import engine, with an exit code."""

    exit_code = 3


def test_an_error_with_an_exit_code_needs_no_declaration(capsys):
    assert exit_code_of(DamagedError("damaged")) == 3
    assert capsys.readouterr().err == "error: damaged\n"


def test_torchrun_reads_the_sentence(tmp_path, monkeypatch, capsys):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert exit_code_of(UserError("no space left")) == 1
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    report = ChildFailedError("toy", {0: failure}).format_msg()
    assert "traceback : no space left\n" in report
    assert failure.timestamp > 0
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    capsys.readouterr()
    assert exit_code_of(UserError("no space left")) == 1
    assert capsys.readouterr().err == "error: no space left\n"
