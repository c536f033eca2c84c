"""Killed processes of a distributed run: what the others say, and restarts by torchrun."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.launch import start, start_pair
from tests.engine.toy import equal

FLAGS = ["--samples", "88", "--epochs", "3", "--logger", "none", "--print-freq", "1"]
FLAGS += ["--checkpoint-steps", "1"]


def wait_for(run: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Wait until a condition is met, while the run continues."""
    end = time.monotonic() + 120
    while not condition():
        if run.poll() is not None or time.monotonic() > end:
            os.killpg(run.pid, signal.SIGKILL)
            pytest.fail(run.communicate()[1])
        time.sleep(0.02)


def children(process: int) -> list[int]:
    """Return the child processes."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(number) for number in text.split()]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pth", weights_only=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return the last checkpoint of a run of two processes that nothing has stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    for run in start_pair("tests.engine.toy", *FLAGS, "--output-dir", str(folder)):
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
    return checkpoint(folder)


def restarted(folder: Path, kills: list[tuple[int, int]]) -> dict:
    """Return the last checkpoint of a run of torchrun, which starts killed processes again.

    Args:
        folder: Output folder.
        kills: Lines of the log after which a rank is killed, and the rank.
    """
    launcher = ["--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.1"]
    launcher += ["--max-restarts", str(len(kills)), "-m", "tests.engine.toy"]
    flags = [*FLAGS, "--pause", "0.03", "--output-dir", str(folder), "--auto-resume"]
    run = start("torch.distributed.run", *launcher, *flags)
    log = folder / "run.log"
    for lines, rank in kills:
        wait_for(run, log.exists)
        before = log.read_text().count(" loss ")
        wait_for(run, lambda wanted=before + lines: log.read_text().count(" loss ") >= wanted)
        os.kill(children(run.pid)[rank], signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert log.read_text().count("reading checkpoint") == len(kills)
    return checkpoint(folder)


def assert_same(one: dict, other: dict) -> None:
    names = one.keys() - {"args", "provenance"}
    assert names == other.keys() - {"args", "provenance"}
    assert all(equal(one[name], other[name]) for name in names)


def test_the_message_of_a_survivor_names_the_rank_that_is_gone(tmp_path):
    runs = start_pair("tests.engine.toy", "--pause", "0.1", "--output-dir", str(tmp_path))
    log = tmp_path / "run.log"
    wait_for(runs[0], lambda: log.exists() and "epoch 0" in log.read_text())
    runs[1].kill()
    _, err = runs[0].communicate(timeout=60)
    assert runs[0].returncode == 1
    assert "Traceback" not in err
    assert f"error [rank 0]: rank 1 (process {runs[1].pid}) has ended: see its error" in err
    assert "start again with --auto-resume" in err
    runs[1].communicate()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_torchrun_restarts_ends_with_the_same_weights(unbroken, tmp_path, rank):
    assert_same(unbroken, restarted(tmp_path, [(3, rank)]))


@pytest.mark.slow
def test_a_run_with_ten_restarts_ends_with_the_same_weights(unbroken, tmp_path):
    draw = random.Random(14)
    kills = [(draw.randrange(1, 4), draw.randrange(2)) for _ in range(10)]
    assert_same(unbroken, restarted(tmp_path, kills))
