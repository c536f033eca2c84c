"""What two processes see: does everything once and leaves each rank's answers as JSON.

One launch for all tests of several processes, since starting torch is what takes the time.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

import engine
from engine import cli, distributed
from engine.distributed import any_process, broadcast_object, max_over_processes
from tests.engine.toy import SIGTERM, ToyConfig, equal, train


def collectives(rank: int) -> dict[str, Any]:
    """Every collective once, and meters of which one process has nothing to add."""
    summed = distributed.all_reduce_sum(torch.tensor([1.0, rank]))
    cpu = torch.device("cpu")
    meters = engine.Meters(cpu)
    meters.update({"loss": torch.tensor(float(rank)), "acc": torch.tensor(0.5)}, n=1 + 2 * rank)
    empty = engine.Meters(cpu, names=["correct"])
    if rank == 0:
        empty.add_sums({"correct": torch.tensor(3)}, n=4)
    return {
        "place": [distributed.rank(), distributed.world_size(), distributed.is_main()],
        "sum": summed.tolist(),
        "max": max_over_processes(10 * rank),
        "any": [any_process(rank == 1), any_process(False), any_process(torch.tensor(rank == 1))],
        "object": broadcast_object({"from": rank}),
        "objects": distributed.all_gather_object({"from": rank}),
        "own": meters.averages(),
        "all": meters.averages(all_processes=True),
        "empty": empty.averages(all_processes=True),
    }


def resumption(rank: int, folder: Path) -> dict[str, Any]:
    """An unbroken run, and one that rank 1 alone is asked to stop, resumed."""
    options = {"samples": 90, "accumulate_steps": 2}
    unbroken = train(ToyConfig(**options))
    place = str(folder / "stopped")
    code = None
    try:
        kill_at = (SIGTERM, 1, 2) if rank == 1 else None
        train(ToyConfig(**options, output_dir=place, kill_at=kill_at))
    except engine.Stopped as stopped:
        code = stopped.code
    halfway = torch.load(folder / "stopped" / "checkpoint.pth", weights_only=True)
    resumed = train(ToyConfig(**options, output_dir=place), resume=True)
    return {
        "code": code,
        "halfway": [halfway["epoch"], halfway["step"]],
        "equal": all(equal(unbroken[name], resumed[name]) for name in unbroken if name != "args"),
        "moved": not equal(halfway["model"], resumed["model"]),
        "weights": {
            # Running means are a process's own until the next step, where the main one's count.
            name: value.double().sum().item()
            for name, value in resumed["model"].items()
            if name.endswith(("weight", "bias"))
        },
    }


def poison(folder: Path) -> str:
    """The error of a run of which one process meets a sample that is not a number."""
    try:
        train(ToyConfig(output_dir=str(folder / "poisoned"), poison_at=17))
    except engine.NonFiniteLossError as error:
        return str(error)
    return ""


def main() -> None:
    """Writes `rank{r}.json` into the folder given as the only argument."""
    folder = Path(sys.argv[1])
    engine.init_distributed("cpu")
    rank = distributed.rank()
    answers = {
        "collectives": collectives(rank),
        "resumption": resumption(rank, folder),
        "poison": poison(folder),
    }
    engine.setup_logging(folder, rank)
    logging.getLogger("engine.test").info("said by %d", rank)
    logging.getLogger("engine.test").warning("warned by %d", rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(answers))
    raise engine.UserError("both\nleave")


if __name__ == "__main__":
    cli.run(main)
