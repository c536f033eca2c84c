"""Cases of killed processes: a training ends at any moment, and its resumed run loses nothing."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from classification.main import main as classify
from irpe_core import CheckpointError, load_checkpoint
from tests.campaign.base import CLASSIFIER, Base
from tests.campaign.oracle import Verdict, run_forked

__all__ = ["kill_case", "torchrun_case"]

ROOT = Path(__file__).parents[2]
_EPOCHS = 4
_EVENTS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir"}


def kill_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Kill a training, at a random moment or at a file operation, and resume it to its end."""
    output = Path(shutil.copytree(base.classifier, folder / "output"))
    planted = output / "checkpoint_9999.pth"
    planted.write_text("a file of the user")
    argv = _flags(base, output)
    for _ in range(rng.choice((1, 2, 3))):
        if rng.random() < 0.5:
            run_forked(classify, argv, folder, kill_after=rng.uniform(0.05, 1.5))
        else:
            at = rng.randrange(1, 60)

            def killed(argv: list[str], at: int = at) -> None:
                _kill_at(at, output)
                classify(argv)

            run_forked(killed, argv, folder)
        fault = _fault_of(output)
        if fault:
            return Verdict("lost file", f"after a kill: {fault}")
    end = run_forked(classify, argv, folder)
    if end.code != 0:
        kind = "hang" if end.timed_out else "crash" if end.code < 0 else "wrong"
        return Verdict(kind, f"the resumed run: {end.output[-300:]}")
    if planted.read_text() != "a file of the user":
        return Verdict("lost file", str(planted))
    return _compare(output, _unbroken(base))


def torchrun_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Kill one of two ranks under torchrun, which starts both again, and let the run end."""
    output = folder / "output"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max_restarts=3"]
    command += ["--nproc_per_node=2", "-m", "classification.main", *_flags(base, output)]
    folder.mkdir(parents=True)
    with (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            time.sleep(rng.uniform(8, 25))
            ranks = sorted(_children(process.pid))
            if ranks:
                os.kill(rng.choice(ranks), signal.SIGKILL)
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            return Verdict("hang", "torchrun did not end in 120 s")
        finally:
            if process.poll() is None:
                for child in (*_children(process.pid), process.pid):
                    os.kill(child, signal.SIGKILL)
                process.wait()
    if code != 0:
        return Verdict("wrong", f"exit code {code}: {(folder / 'stderr').read_text()[-300:]}")
    return _compare(output, _unbroken(base, processes=2))


def _flags(base: Base, output: Path) -> list[str]:
    """Return the flags of a training with a checkpoint after each step."""
    return [
        *(*CLASSIFIER, f"--epochs={_EPOCHS}", "--data_path", str(base.images)),
        *("--checkpoint_steps=1", "--output_dir", str(output), "--auto_resume"),
    ]


def _kill_at(number: int, output: Path) -> None:
    """Kill this process at its n-th file operation in a folder, syncing to the disk included."""
    left = [number]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event in _EVENTS and any(str(output) in str(one) for one in arguments[:2]):
            count()

    sync = os.fsync

    def counted_sync(descriptor: int) -> None:
        count()
        sync(descriptor)
        count()

    os.fsync = counted_sync
    sys.addaudithook(hook)


@functools.cache
def _unbroken(base: Base, processes: int = 1) -> Path:
    """Return the output folder of the same training without an interruption."""
    folder = base.images.parent / f"unbroken_{processes}_{os.getpid()}"
    if processes == 1:
        output = Path(shutil.copytree(base.classifier, folder / "output"))
        code = run_forked(classify, _flags(base, output), folder).code
    else:
        output = folder / "output"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", "-m", "classification.main"]
        command += _flags(base, output)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode
    if code != 0:
        raise RuntimeError("the training without an interruption failed")
    return output


def _compare(output: Path, wanted: Path) -> Verdict:
    """Compare weights bit for bit, and the epochs of the log."""
    fault = _fault_of(output)
    if fault:
        return Verdict("lost file", fault)
    own, other = (load_checkpoint(path / "checkpoint.pth") for path in (output, wanted))
    for part in ("model", "model_ema"):
        if any(not torch.equal(own[part][key], other[part][key]) for key in other[part]):
            return Verdict("wrong", f"{part} differs from that of an unbroken run")
    epochs, all_epochs = (_epochs(path) for path in (output, wanted))
    if epochs != all_epochs:
        return Verdict("wrong", f"the log has the epochs {epochs}")
    return Verdict("correct run")


def _fault_of(output: Path) -> str:
    """Describe a checkpoint that is missing or cannot be read; empty if there is none."""
    try:
        for name in ("checkpoint.pth", "best_checkpoint.pth"):
            load_checkpoint(output / name)
    except CheckpointError as error:
        return str(error)
    return ""


def _epochs(output: Path) -> list[int]:
    """Return the epochs of the log."""
    return [json.loads(line)["epoch"] for line in (output / "log.txt").read_text().splitlines()]


def _children(process: int) -> Iterator[int]:
    """Yield the ids of the child processes of a process."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return
    yield from map(int, text.split())
