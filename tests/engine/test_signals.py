"""Stopping after a signal: a checkpoint is saved first, except after a second Ctrl-C."""

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
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 138),
    ],
    ids=["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"],
)
def test_a_run_saves_once_after_a_signal_and_stops_with_its_code(number, code, capfd):
    saved = []
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
        assert saved == []
        with pytest.raises(Stopped) as stopped:
            stop.check(lambda: saved.append(1))
    assert stopped.value.code == code
    assert saved == [1]
    assert "stopping after the current step" in capfd.readouterr().err


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_sigint_after_another_signal_stops_at_once(first):
    with StopRequest():
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_sets_the_code_and_further_sigterms_have_no_effect():
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            stop.check(lambda: None)
    assert stopped.value.code == 130


def test_the_old_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("before", [True, False])
def test_a_signal_stops_an_evaluation_at_once(before):
    def evaluate(stop: StopRequest) -> None:
        if before:
            os.kill(os.getpid(), signal.SIGTERM)
        with stop.at_once():
            assert not before
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the evaluation continued")

    with StopRequest() as stop, pytest.raises(Stopped) as stopped:
        evaluate(stop)
    assert stopped.value.code == 143


def test_stopped_is_not_caught_as_an_exception():
    assert not issubclass(Stopped, Exception)


def test_a_signal_to_the_process_group_does_not_stop_the_loader_before_the_checkpoint(tmp_path):
    flags = ["--output-dir", str(tmp_path), "--num-workers", "2", "--pause", "0.5"]
    run = start("tests.engine.toy", *flags)
    try:
        while "epoch 0 3/" not in run.stdout.readline():
            assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)  # The next step has begun.
        os.killpg(run.pid, signal.SIGTERM)  # Like torchrun.
        _, err = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == 143, err
    assert err == "stopping after the current step or evaluation; press Ctrl-C to stop at once\n"
    assert (tmp_path / "checkpoint.pth").exists()
