"""The process group: the same functions for one process and for several.

torchrun or Slurm starts several processes. In a single process there is no process group, and each
collective returns the result for one process. In several processes, tensors on a GPU are sent by
NCCL and tensors on the CPU by gloo; one default group has both backends. The collectives of Python
values, such as `any_process(bool)` and `barrier`, therefore do not wait for the GPU.
"""

import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import UsageError
from engine.launcher import by_torchrun, launched_as

__all__ = [
    "in_process_group",
    "lost_ranks",
    "init_distributed",
    "select_device",
    "shutdown",
    "distribute",
    "rank",
    "world_size",
    "is_main",
    "all_reduce_sum",
    "max_over_processes",
    "any_process",
    "any_process_later",
    "barrier",
    "broadcast_object",
    "all_gather_object",
]


def init_distributed(device: str = "auto") -> torch.device:
    """Join the process group, if there are several processes, and select the device.

    Args:
        device: `auto` (`cuda` if there is a GPU, else `cpu`), `cuda` (the GPU of the local rank),
            `cuda:N` (that GPU, for a single process) or `cpu`.

    Returns:
        The device of this process.

    Raises:
        UsageError: The device is unknown or missing, or MASTER_ADDR is not set for several Slurm
            nodes.
    """
    rank, local_rank, world_size = launched_as()
    chosen = _choose_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=_store(rank, world_size),
            rank=rank,
            world_size=world_size,
        )
        _members()
    return chosen


def select_device(device: str = "auto") -> torch.device:
    """Return the device that an option `device` names, without joining a process group.

    Raises:
        UsageError: The device is unknown or missing.
    """
    _, local_rank, world_size = launched_as()
    return _choose_device(device, local_rank, world_size)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        _members.cache_clear()
        dist.destroy_process_group()


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model in DistributedDataParallel; in a single process return it unchanged."""
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def _choose_device(device: str, local_rank: int, world_size: int) -> torch.device:
    """Return the device of this process (see `init_distributed`)."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cuda", "cpu") or (index and (kind != "cuda" or not index.isdigit())):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and gpus == 0):
        return torch.device("cpu")
    if index and world_size > 1:
        raise UsageError(
            f"--device must be auto, cpu or cuda with {world_size} processes, got {device!r}"
        )
    number = int(index) if index else local_rank
    if number >= gpus:
        raise UsageError(
            f"--device {device} needs GPU {number}, but torch finds {gpus} GPU(s); "
            "start fewer processes or use --device cpu"
        )
    return torch.device("cuda", number)


def _store(rank: int, world_size: int) -> dist.Store:
    """Return the store in which the processes find each other.

    torchrun keeps its store when it restarts the processes. A process that reads the address of
    another one before that has written its own would get the one of before the restart.
    """
    url = "env://" if by_torchrun() else _slurm_rendezvous()
    store, _, _ = next(dist.rendezvous(url, rank, world_size))
    return dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _slurm_rendezvous() -> str:
    """Return the URL at which the processes of a Slurm step meet."""
    env = os.environ
    if "MASTER_ADDR" not in env and int(env.get("SLURM_STEP_NUM_NODES", 1)) > 1:
        raise UsageError(
            "MASTER_ADDR must be set to the first of several Slurm nodes: export MASTER_ADDR="
            "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
        )
    # The port depends on the job, so that two jobs can share a node.
    port = env.get("MASTER_PORT", 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)
    return f"tcp://{env.get('MASTER_ADDR', '127.0.0.1')}:{port}"


def in_process_group() -> bool:
    """Return whether this process has joined a process group."""
    return dist.is_initialized()


def lost_ranks() -> dict[int, int]:
    """Return the ranks of this machine whose process has ended, with the number of the process."""
    if not dist.is_initialized():
        return {}
    host = socket.gethostname()
    ranks = enumerate(_members())
    return {rank: pid for rank, (place, pid) in ranks if place == host and _has_ended(pid)}


@functools.cache
def _members() -> list[tuple[str, int]]:
    """Return host and process number of all ranks; all processes must make the first call."""
    return all_gather_object((socket.gethostname(), os.getpid()))


def _has_ended(process: int) -> bool:
    """Return whether a process has ended, also if its parent has not noticed yet."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    # Without /proc.
    except OSError:
        return False
    return state in ("Z", "X")


def rank() -> int:
    """Return the number of this process, from 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the main process, which writes the files."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor over all processes in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def max_over_processes(value: int) -> int:
    """Return the largest value of all processes, without waiting for the GPU."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def any_process(flag: bool | torch.Tensor) -> bool:
    """Return whether the flag is true in any process; all processes get the same answer.

    Args:
        flag: A bool, or a tensor with one element, which is reduced on its device.
    """
    if not isinstance(flag, torch.Tensor):
        return max_over_processes(int(flag)) > 0
    return any_process_later(flag)()


def any_process_later(flag: torch.Tensor) -> Callable[[], bool]:
    """Start `any_process` of a tensor; all processes must call this.

    Returns:
        A function that returns the answer. It waits for what the GPU had to do before this call,
        but not for what was queued since.
    """
    flag = flag.to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    # A copy that does not block goes to pinned memory. It is complete after the event.
    copy = flag.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def answer() -> bool:
        event.synchronize()
        return bool(copy)

    return answer


def barrier() -> None:
    """Wait until all processes have called this; do not wait for kernels queued on a GPU."""
    max_over_processes(0)


def broadcast_object(value: Any) -> Any:
    """Return the main process's value in every process; it must be picklable."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all processes, ordered by rank; they must be picklable."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered
