"""The number of images per optimizer step, and of optimizer steps per epoch."""

from torch.utils.data import DataLoader

from engine.distributed import world_size
from engine.errors import UsageError
from engine.run_config import RunConfig

__all__ = ["steps_per_epoch", "total_batch_size"]


def total_batch_size(config: RunConfig) -> int:
    """Return the number of images per optimizer step over all processes."""
    return config.batch_size * config.accumulate_steps * world_size()


def steps_per_epoch(config: RunConfig, batches: DataLoader) -> int:
    """Return the number of optimizer steps per epoch.

    Raises:
        UsageError: An epoch of this process has fewer batches than one step needs.
    """
    steps = len(batches) // config.accumulate_steps
    if steps == 0:
        raise UsageError(
            f"--batch-size x --accumulate-steps must be at most {len(batches.sampler)}, the number "
            f"of images per epoch in each of {world_size()} process(es), "
            f"got {config.batch_size} x {config.accumulate_steps}"
        )
    return steps
