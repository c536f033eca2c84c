"""Everything that the tests need from two processes; each writes its results to a JSON file.

All tests share one run, because importing torch takes most of the time.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import engine
from engine import cli, distributed, session
from engine.distributed import any_process, broadcast_object, max_over_processes
from irpe_core import RPEConfig
from irpe_core.autotune import Autotuner
from irpe_core.candidates import COMPOSED, Kind, Size
from tests.engine import toy
from tests.engine.toy import SIGTERM, ToyConfig, equal, train


def collectives(rank: int) -> dict[str, Any]:
    """Return the results of every collective, and of meters with updates in one process only."""
    summed = distributed.all_reduce_sum(torch.tensor([1.0, rank]))
    cpu = torch.device("cpu")
    meters = engine.Meters(cpu)
    meters.update({"loss": torch.tensor(float(rank)), "acc": torch.tensor(0.5)}, n=1 + 2 * rank)
    updated_by_main = engine.Meters(cpu, names=["correct"])
    if rank == 0:
        updated_by_main.add_sums({"correct": torch.tensor(3)}, n=4)
    return {
        "place": [distributed.rank(), distributed.world_size(), distributed.is_main()],
        "sum": summed.tolist(),
        "max": max_over_processes(10 * rank),
        "any": [any_process(rank == 1), any_process(False), any_process(torch.tensor(rank == 1))],
        "object": broadcast_object({"from": rank}),
        "objects": distributed.all_gather_object({"from": rank}),
        "own": meters.averages(),
        "all": meters.averages(all_processes=True),
        "updated_by_main": updated_by_main.averages(all_processes=True),
    }


def resumption(rank: int, folder: Path) -> dict[str, Any]:
    """Compare an uninterrupted run with one that is resumed after a signal to rank 1 only."""
    options = {"samples": 90, "accumulate_steps": 2}
    uninterrupted = train(ToyConfig(**options))
    output_dir = str(folder / "stopped")
    code = None
    try:
        kill_at = (SIGTERM, 1, 2) if rank == 1 else None
        train(ToyConfig(**options, output_dir=output_dir, kill_at=kill_at))
    except engine.Stopped as stopped:
        code = stopped.code
    halfway = torch.load(folder / "stopped" / "checkpoint.pth", weights_only=True)
    resumed = train(ToyConfig(**options, output_dir=output_dir), resume=True)
    names = uninterrupted.keys() - {"args"}
    limited = train(ToyConfig(**options, max_steps=3))
    with mock.patch.object(toy, "evaluate", return_value={"mean": 0.0}):
        stopped_early = train(ToyConfig(**options, epochs=9, early_stop=1))
    return {
        "limited": [limited["epoch"], limited["step"]],
        "early_stop": stopped_early["epoch"],
        "code": code,
        "halfway": [halfway["epoch"], halfway["step"]],
        "equal": all(equal(uninterrupted[name], resumed[name]) for name in names),
        "moved": not equal(halfway["model"], resumed["model"]),
        "weights": {
            # Processes have different running means of batch norm until the next forward pass.
            name: value.double().sum().item()
            for name, value in resumed["model"].items()
            if name.endswith(("weight", "bias"))
        },
    }


def local_folders(rank: int, folder: Path) -> dict[str, Any]:
    """Compare an uninterrupted run with one whose output folder is local to each process.

    Rank 1 has no checkpoint, and then an old one in the path of rank 0.
    """
    options = {"samples": 90, "logger": None}
    uninterrupted = train(ToyConfig(**options))
    config = ToyConfig(**options, output_dir=str(folder / f"local{rank}"))
    found = []
    for last in (3, 5):
        train(config.model_copy(update={"max_steps": last}), resume=last == 5)
        found.append((folder / f"local{rank}" / "checkpoint.pth").exists())
    old = (0, "old") if rank else (1, "new")
    with mock.patch.object(session, "_fingerprint", return_value=old):
        resumed = train(config, resume=True)
    # Each end by `max_steps` evaluates once more.
    names = uninterrupted.keys() - {"args", "best", "evals_since_best"}
    return {
        "found": found,
        "equal": all(equal(uninterrupted[name], resumed[name]) for name in names),
    }


def attention_choices(rank: int, folder: Path) -> list[str]:
    """Return the choices of attention, for which the processes have opposite measurements."""
    os.environ["IRPE_AUTOTUNE"] = "1"
    fastest = (COMPOSED, "triton/rows")[rank]
    tuner = Autotuner(lambda *_: {fastest: 1e-3}, folder / f"autotune{rank}.json")
    shape = (2, 64, 8, 256, torch.float32, False, False, True)
    kinds = [Kind(RPEConfig(ratio), *shape) for ratio in (1.0, 2.0, 3.0)]

    def choose(kind: Kind) -> str:
        return tuner.choose_kind(kind, Size(8, 14, 14), torch.device("cpu"))

    # The last two are chosen first by rank 0 and by rank 1, without the other process.
    choices = {kinds[0]: choose(kinds[0])}
    choices[kinds[1 + rank]] = choose(kinds[1 + rank])
    torch.distributed.barrier()
    choices[kinds[2 - rank]] = choose(kinds[2 - rank])
    # Rank 0 has the store and must not exit before the other process has read from it.
    torch.distributed.barrier()
    return [choices[kind] for kind in kinds]


def nonfinite(folder: Path) -> str:
    """Return the error of a run in which one process has a sample with NaN."""
    try:
        train(ToyConfig(output_dir=str(folder / "nonfinite"), nan_at=17))
    except engine.NonFiniteLossError as error:
        return str(error)
    return ""


def main() -> None:
    """Write `rank{r}.json` to the folder that is the only argument, then fail."""
    folder = Path(sys.argv[1])
    engine.init_distributed("cpu")
    rank = distributed.rank()
    results = {
        "collectives": collectives(rank),
        "resumption": resumption(rank, folder),
        "nonfinite": nonfinite(folder),
        "attention_choices": attention_choices(rank, folder),
        "local_folders": local_folders(rank, folder),
    }
    engine.setup_logging(folder, rank)
    logging.getLogger("engine.test").info("info of rank %d", rank)
    logging.getLogger("engine.test").warning("warning of rank %d", rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    raise engine.UserError("both\nfail")


if __name__ == "__main__":
    cli.run(main)
