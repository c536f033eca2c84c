"""Process group: one process or many, started by torchrun or by Slurm, with the same calls.

With a single process there is no process group, and every function below is the identity. With
several, tensors on a GPU travel by NCCL and those on the CPU by gloo, both in one default group; so
what only the host has to know (`any_process` of a bool, `barrier`) never waits for the GPU.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import UsageError


def launched_as() -> tuple[int, int, int]:
    """Reads rank, local rank and number of processes from the launcher's environment.

    torchrun's variables come first, then those of a Slurm step (`srun`; a batch script by itself is
    not a step, although Slurm sets SLURM_PROCID there too), else this is a single process.
    """
    env = os.environ
    if _by_torchrun():
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        size = int(env["SLURM_STEP_NUM_TASKS"])
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), size
    return 0, 0, 1


def init_distributed(device: str = "auto") -> torch.device:
    """Join the process group, if there is one to join, and choose the device of this process.

    Args:
        device: `auto` (a GPU where there is one), `cuda` (the GPU of this local rank), `cuda:N`
            (that GPU; single process only) or `cpu`.

    Raises:
        UsageError: the device is unknown or not there, or Slurm left out the master's address.
    """
    rank, local_rank, world_size = launched_as()
    chosen = _choose_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            init_method="env://" if _by_torchrun() else _slurm_rendezvous(),
            rank=rank,
            world_size=world_size,
        )
    return chosen


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model for training in several processes; return it as it is in a single one."""
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def _by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _choose_device(device: str, local_rank: int, world_size: int) -> torch.device:
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cuda", "cpu") or (index and (kind != "cuda" or not index.isdigit())):
        raise UsageError(f"--device is {device!r} but should be auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and gpus == 0):
        return torch.device("cpu")
    if index and world_size > 1:
        raise UsageError(
            f"--device {device} names one GPU but there are {world_size} processes: use cuda"
        )
    number = int(index) if index else local_rank
    if number >= gpus:
        raise UsageError(
            f"--device {device}: GPU {number} is wanted but torch sees {gpus}; "
            "start fewer processes or use --device cpu"
        )
    return torch.device("cuda", number)


def _slurm_rendezvous() -> str:
    env = os.environ
    if "MASTER_ADDR" not in env and int(env.get("SLURM_STEP_NUM_NODES", 1)) > 1:
        raise UsageError(
            "several Slurm nodes need the first one's address: export MASTER_ADDR="
            "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
        )
    # A port that follows from the job lets two jobs share a node.
    port = env.get("MASTER_PORT", 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)
    return f"tcp://{env.get('MASTER_ADDR', '127.0.0.1')}:{port}"


def rank() -> int:
    """The number of this process, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Adds a tensor up over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def max_over_processes(value: int) -> int:
    """The largest of the processes' values; a host-side call that never waits for the GPU."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def any_process(flag: bool | torch.Tensor) -> bool:
    """Whether the flag holds in any process; every process gets the same answer.

    Args:
        flag: a bool, or a tensor with one element, which is reduced on its own device and fetched
            once.
    """
    if not isinstance(flag, torch.Tensor):
        return max_over_processes(int(flag)) > 0
    flag = flag.to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def barrier() -> None:
    """Waits until every process has come here; does not wait for work queued on a GPU."""
    max_over_processes(0)


def broadcast_object(value: Any) -> Any:
    """Gives every process the main process's value, which must pickle; theirs is ignored."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Gives every process the list of all processes' values, by rank; they must pickle."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def shutdown() -> None:
    """Leaves the process group; harmless where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
