"""The oracle of the campaign finds planted faults; a short campaign finds none."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import UsageError
from tests.campaign.mutations import mutate_bytes, mutate_value
from tests.campaign.oracle import Verdict, trial

ROOT = Path(__file__).parents[2]


def judged(folder: Path, command, *, kept=(), culprits=("--epochs",), timeout=60.0) -> Verdict:
    return trial(folder, lambda argv: command(), culprits=culprits, kept=kept, timeout=timeout)


def fail(message: str) -> None:
    raise UsageError(message)


def fill_memory() -> None:
    assert len(bytearray(b"x") * (2200 << 20)) > 2 << 30


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (lambda: None, "correct run"),
        (lambda: fail("--epochs must be at least 1, got 0"), "clean error"),
        (lambda: fail("something is odd"), "wrong"),
        (lambda: sys.exit(3), "wrong"),
        (lambda: sys.exit(1), "wrong"),
        (lambda: Path("eval.json").write_text('{"acc1": NaN}'), "wrong"),
        (lambda: Path("log.txt").write_text('{"a": 1}\n{"a": Infinity}\n'), "wrong"),
        (lambda: {}["key"], "traceback"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "crash"),
        (lambda: os.abort(), "crash"),
        (lambda: Path("ran").touch(), "code run"),
        (fill_memory, "memory"),
    ],
    ids=[
        *("correct", "error", "no-culprit", "exit-code", "no-sentence", "nan", "infinity"),
        *("traceback", "segfault", "abort", "payload", "memory"),
    ],
)
def test_the_oracle_finds_a_planted_fault(command, kind, tmp_path):
    assert judged(tmp_path, command).kind == kind


def test_the_oracle_finds_a_hang_and_ends_it(tmp_path):
    start = time.monotonic()
    verdict = judged(tmp_path, lambda: time.sleep(60), timeout=0.5)
    assert verdict.kind == "hang"
    assert "test_campaign.py" in verdict.note
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "command",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text("new"),
        lambda file: file.rename("x"),
    ],
    ids=["deleted", "replaced", "renamed"],
)
def test_the_oracle_finds_a_lost_file(command, tmp_path):
    file = tmp_path / "input" / "notes.txt"
    file.parent.mkdir()
    file.write_text("a file of the user")
    assert judged(tmp_path, lambda: command(file), kept=[file.parent]).kind == "lost file"
    assert judged(tmp_path, lambda: None, kept=[tmp_path / "input"]).kind == "correct run"


def test_mutations_change_a_copy_and_depend_only_on_the_seed():
    data, tree = b"some bytes" * 20, {"a": [1, {"b": 2.0}], "c": "text"}
    for seed in range(200):
        assert mutate_bytes(random.Random(seed), data) == mutate_bytes(random.Random(seed), data)
        first, second = (mutate_value(random.Random(seed), tree) for _ in range(2))
        assert repr(first) == repr(second)
    assert tree == {"a": [1, {"b": 2.0}], "c": "text"}
    assert len({repr(mutate_value(random.Random(seed), tree)[0]) for seed in range(200)}) > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_short_campaign_finds_nothing(seed):
    command = [sys.executable, "-m", "tests.campaign", f"--seed={seed}", "--rounds=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
