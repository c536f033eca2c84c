"""A loss that is not finite: find where it began, save what it takes to see it again, stop.

The step is run once more from the same seed with a hook on every module; a module's hook fires when
it has finished, so the first one with a bad output is where the trouble entered.
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


class NonFiniteLossError(UserError):
    """The loss of a step is infinite or not a number."""


def report_nonfinite(
    forward: Callable[[Any], dict[str, torch.Tensor]],
    model: nn.Module,
    batch: Any,
    figures: dict[str, torch.Tensor],
    *,
    seed: int,
    epoch: int,
    step: int,
    output_dir: Path | None,
) -> NoReturn:
    """Saves the batch and the weights of a step whose loss is not finite, and says where it began.

    All processes call this, also those whose own loss is finite, since running the step again may
    take collectives. Each of the others saves `nonfinite_rank{r}.pth`: a dict with `epoch`, `step`,
    `seed`, `batch`, `figures` (what the step returned), `culprit`, `model`.

    Args:
        forward: runs the step function on a batch of the loader.
        model: the model it runs; may be wrapped or compiled.
        batch: the batch as the loader gave it.
        figures: what the step function returned for it.
        seed: the seed the step started from.
        epoch: the epoch's number.
        step: the optimizer step's number in its epoch.
        output_dir: where to save; None saves nothing.

    Raises:
        NonFiniteLossError: always.
    """
    figures = {name: value.detach() for name, value in figures.items()}
    culprit = _find_culprit(forward, unwrap(model), batch, seed)
    where = f"at epoch {epoch}, step {step}"
    if is_finite(figures["loss"]):
        barrier()  # a launcher ends the processes that remain, so the one that saves must not
        raise NonFiniteLossError(f"the loss of another process is not finite {where}")
    report = f"the loss is {float(figures['loss'])} {where}: {culprit}"
    if output_dir is not None:
        path = output_dir / f"nonfinite_rank{rank()}.pth"
        content = {"epoch": epoch, "step": step, "seed": seed, "batch": batch, "figures": figures}
        atomic_save(content | {"culprit": culprit, "model": unwrap(model).state_dict()}, path)
        report += f"; batch and weights are in {path}"
    barrier()
    raise NonFiniteLossError(report)


def _find_culprit(
    forward: Callable[[Any], dict[str, torch.Tensor]], model: nn.Module, batch: Any, seed: int
) -> str:
    """Runs the step again and names the first thing that is not finite, in a phrase."""
    bad_weight = next((name for name, p in model.named_parameters() if not is_finite(p)), None)
    seed_all(seed)
    # Eager, since compiled code calls no hooks; without gradients, so that a distributed model does
    # not wait for a backward pass.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _bad_outputs(model) as bad:
        figures = forward(batch)
    if bad_weight:
        return f"parameter {bad_weight} was not finite before the step"
    if not is_finite(batch):
        return "the batch itself is not finite"
    if bad:
        return f"the first output that is not finite is that of module {bad[0]}"
    names = ", ".join(name for name, value in figures.items() if not is_finite(value))
    if names:
        return f"every module's output is finite, of the figures computed from them not {names}"
    return "a second run of the same step was finite"


@contextmanager
def _bad_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of modules whose outputs are not finite, in order of execution."""
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
