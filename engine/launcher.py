"""The processes that torchrun or Slurm has started, by their environment variables."""

import os

__all__ = ["by_torchrun", "launched_as"]


def launched_as() -> tuple[int, int, int]:
    """Return rank, local rank and number of processes from the environment of the launcher.

    The variables of torchrun come first, then those of a Slurm step (`srun`). Without them this is
    a single process. A Slurm batch script is not a step, although Slurm sets SLURM_PROCID in it.
    """
    env = os.environ
    if by_torchrun():
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        size = int(env["SLURM_STEP_NUM_TASKS"])
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), size
    return 0, 0, 1


def by_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
