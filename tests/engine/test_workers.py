"""Workers of a data loader that die: one sentence, after a checkpoint, and never a hang."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from engine import UserError, shield_worker
from engine.meters import TimedBatches
from engine.workers import awaited_batch, worker_error
from tests.engine.launch import ROOT, start
from tests.engine.toy import ToyConfig, equal, train

SHORT = "shared memory is too small (df -h /dev/shm): give the container more"


class Numbers(Dataset):
    """Tensors; the worker that loads the first one gets a signal."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 0 and self.number:
            os.kill(os.getpid(), self.number)
        return torch.zeros(4)


class Unsendable:
    """A batch that cannot be sent, as one for which there is no shared memory."""

    def __reduce__(self) -> str:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: (28)")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_worker_is_named_where_a_batch_is_awaited(number):
    loader = DataLoader(Numbers(number), num_workers=1, worker_init_fn=shield_worker)
    batches = TimedBatches(loader)
    process = batches._batches._workers[0].pid
    with pytest.raises(UserError) as caught:
        list(batches)
    message = str(caught.value)
    assert message.startswith(f"the data loading process {process} ended unexpectedly (")
    assert message.endswith("use fewer --num-workers or a smaller --batch-size")
    assert signal.strsignal(number) in message


def test_a_worker_that_dies_during_a_step_fails_in_the_next_wait():
    loader = DataLoader(Numbers(), num_workers=1, prefetch_factor=1, worker_init_fn=shield_worker)
    batches = TimedBatches(loader)
    next(batches)
    (worker,) = batches._batches._workers
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    torch.ones(3).sum()  # A step, in which torch's own handler would raise its error.
    with pytest.raises(UserError, match=f"the data loading process {worker.pid} ended"):
        list(batches)


def test_a_batch_that_cannot_be_sent_is_an_error_and_no_hang(capfd):
    loader = DataLoader(
        Numbers(), num_workers=1, worker_init_fn=shield_worker, collate_fn=lambda _: Unsendable()
    )
    with pytest.raises(UserError, match="cannot send its batch: shared memory is too small"):
        next(TimedBatches(loader))
    assert "cannot send its batch: unable to allocate shared memory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", SHORT),
        ("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space (28)", SHORT),
        ("unable to write to file </torch_1_2_3>: No space left on device (28)", SHORT),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "process 7, 8 ended unexpectedly"),
    ],
)
def test_errors_of_torch_about_workers_become_one_sentence(text, words):
    assert words in str(worker_error(RuntimeError(text)))


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError()], ids=repr)
def test_a_worker_that_dies_while_it_sends_is_an_error_of_a_worker(error):
    words = "a data loading process ended unexpectedly"
    assert words in str(worker_error(error))
    with pytest.raises(UserError, match=words), awaited_batch():
        raise error


def test_other_errors_are_not_about_workers():
    assert worker_error(RuntimeError("CUDA error: out of memory")) is None


def test_a_worker_prints_nothing_if_the_main_process_closes_a_connection():
    program = """
import os, socket
from multiprocessing import resource_sharer
from engine.workers import shield_worker
shield_worker(0)
memory = resource_sharer.DupFd(0)
with socket.socket(socket.AF_UNIX) as client:
    client.connect(resource_sharer._resource_sharer._address)
os.close(memory.detach())  # The next connection is served after the closed one.
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_run_saves_its_state_before_it_ends_for_a_dead_worker(tmp_path):
    whole = train(ToyConfig(num_workers=2, output_dir=str(tmp_path / "whole")))
    flags = ["--num-workers", "2", "--output-dir", str(tmp_path / "run")]
    run = start("tests.engine.toy", *flags, "--kill-worker-at", "43")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert err.count("\n") == 1, err
    assert err.startswith("error: the data loading process ")
    saved = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert saved["epoch"] == -1
    resumed = train(ToyConfig(num_workers=2, output_dir=str(tmp_path / "run")), resume=True)
    assert all(equal(whole[name], resumed[name]) for name in whole.keys() - {"args"})
