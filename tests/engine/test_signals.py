"""Stopping: signals raise a flag, the boundary saves and leaves, people in a hurry are heard."""

import os
import signal
import time

import pytest

from engine import Stopped, StopRequest
from tests.engine.launch import start


def test_without_a_signal_nothing_stops():
    with StopRequest() as stop:
        assert not stop.requested
        stop.check(lambda: pytest.fail("saved"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_once_at_the_boundary_and_leaves_with_its_code(number, code, capfd):
    saved = []
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
        assert saved == []
        with pytest.raises(Stopped) as stopped:
            stop.check(lambda: saved.append(1))
    assert stopped.value.code == code
    assert saved == [1]
    assert "stopping at the next checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_sigint_after_a_request_leaves_at_once(first):
    with StopRequest():
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_decides_the_code_and_further_sigterms_are_harmless():
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            stop.check(lambda: None)
    assert stopped.value.code == 130


def test_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_no_except_exception_swallows_a_stop():
    assert not issubclass(Stopped, Exception)


def test_a_signal_to_the_whole_group_spares_the_loader_until_the_checkpoint_is_written(tmp_path):
    flags = ["--output-dir", str(tmp_path), "--num-workers", "2", "--pause", "0.5"]
    run = start("tests.engine.toy", *flags)
    try:
        while "step 3/" not in run.stdout.readline():
            assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)  # into the next step
        os.killpg(run.pid, signal.SIGTERM)  # as torchrun does
        _, err = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 143, err
    assert err == "stopping at the next checkpoint; Ctrl-C leaves at once\n"
    assert (tmp_path / "checkpoint.pth").exists()
