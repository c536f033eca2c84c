"""A loss that is not finite: find its origin, save what reproduces it, and stop the run.

The step runs again from the same seed, with a forward hook on every module. A hook is called when
its module has finished, so the first module with an output that is not finite is the origin.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from engine.checkpoint import atomic_save
from engine.distributed import barrier, rank
from engine.errors import UserError
from engine.seeding import seed_all
from engine.tensors import is_finite, unwrap

__all__ = ["NonFiniteLossError", "report_nonfinite"]


class NonFiniteLossError(UserError):
    """The loss of a step is infinite or NaN."""


def report_nonfinite(
    forward: Callable[[Any], dict[str, torch.Tensor]],
    model: nn.Module,
    batch: Any,
    metrics: dict[str, torch.Tensor],
    *,
    seed: int,
    epoch: int,
    step: int,
    output_dir: Path | None,
) -> NoReturn:
    """Find where a loss stopped being finite, save the batch and the weights, and raise an error.

    All processes call this, even with a finite loss of their own, because the step runs again and
    may use collectives. Each process with a loss that is not finite saves `nonfinite_rank{r}.pth`:
    a dict with `epoch`, `step`, `seed`, `batch`, `metrics` (of the step), `culprit` (the origin, in
    words) and `model` (the state dict).

    Args:
        forward: Runs the step function on a batch of the loader.
        model: Model that the step function runs; it may be compiled or distributed.
        batch: Batch of the loader.
        metrics: Result of the step function for this batch.
        seed: Seed of the step.
        epoch: Number of the epoch.
        step: Number of the optimizer step in the epoch.
        output_dir: Folder to save to; None saves nothing.

    Raises:
        NonFiniteLossError: Always.
    """
    metrics = {name: value.detach() for name, value in metrics.items()}
    culprit = _find_culprit(forward, unwrap(model), batch, seed)
    where = f"at epoch {epoch}, step {step}"
    if is_finite(metrics["loss"]):
        # Wait for the processes that save: the launcher ends them when this process exits.
        barrier()
        raise NonFiniteLossError(f"the loss of another process is not finite {where}")
    report = f"the loss is {float(metrics['loss'])} {where}: {culprit}"
    if output_dir is not None:
        path = output_dir / f"nonfinite_rank{rank()}.pth"
        content = {"epoch": epoch, "step": step, "seed": seed, "batch": batch, "metrics": metrics}
        atomic_save(content | {"culprit": culprit, "model": unwrap(model).state_dict()}, path)
        report += f"; batch and weights are in {path}"
    barrier()
    raise NonFiniteLossError(report)


def _find_culprit(
    forward: Callable[[Any], dict[str, torch.Tensor]], model: nn.Module, batch: Any, seed: int
) -> str:
    """Run the step again and return the first thing that is not finite, in words."""
    bad_weight = next((name for name, p in model.named_parameters() if not is_finite(p)), None)
    seed_all(seed)
    # Compiled code does not call hooks, so run it eagerly. Without gradients, a distributed model
    # does not wait for a backward pass.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _bad_modules(model) as bad:
        metrics = forward(batch)
    if bad_weight:
        return f"parameter {bad_weight} was not finite before the step"
    if not is_finite(batch):
        return "the batch itself is not finite"
    if bad:
        return f"the first output that is not finite is that of module {bad[0]}"
    names = ", ".join(name for name, value in metrics.items() if not is_finite(value))
    if names:
        return f"the outputs of all modules are finite, but not these metrics: {names}"
    return "all values were finite when the same step ran again"


@contextmanager
def _bad_modules(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules with outputs that are not finite, in order of execution."""
    bad: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not is_finite(output):
                bad.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name or type(module).__name__))
        for name, module in model.named_modules()
    ]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()
