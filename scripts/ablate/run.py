"""Run the cells of an ablation, several at once, each as a process of its trainer."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine import UserError, provenance, replacing
from engine.provenance import machine
from scripts.ablate.cells import Ablation, Cell
from scripts.ablate.file import folder_name
from scripts.ablate.processes import CellError, Launcher, Processes, StoppedError
from scripts.ablate.progress import CellProgress
from scripts.ablate.results import (
    finished,
    metric_at,
    read_result,
    training_record,
    write_json,
)

__all__ = ["RunOptions", "commands_of", "run_cells"]

LOG = "console.log"


@dataclass(frozen=True)
class RunOptions:
    """Options of a run.

    Attributes:
        output_dir: Folder of the ablation.
        launcher: Words before the module in the command of a cell.
        jobs: Number of cells at once.
        device: Device of the trainers; empty for that of their options.
    """

    output_dir: Path
    launcher: Launcher
    jobs: int = 1
    device: str = ""

    @property
    def flags(self) -> list[str]:
        """Flags of the trainer."""
        return ["--device", self.device] if self.device else []


def commands_of(ablation: Ablation, cell: Cell, options: RunOptions) -> list[list[str]]:
    """Return the commands of a cell: the training, and the evaluations if there are any."""
    parts = [_training(ablation, cell, options)]
    if labels := _to_evaluate(cell):
        parts.append(_evaluations(ablation, cell, labels, options))
    return [options.launcher.command(*part) for part in parts]


def _training(ablation: Ablation, cell: Cell, options: RunOptions) -> list[str]:
    """Return the module and the arguments of the training of a cell."""
    folder = options.output_dir / cell.folder
    files = ("--config", str(folder / "options.yaml"), "--output_dir", str(folder))
    return [f"{ablation.file.trainer}.main", *files, "--auto_resume", *options.flags]


def _evaluations(
    ablation: Ablation, cell: Cell, labels: list[str], options: RunOptions
) -> list[str]:
    """Return the module and the arguments of the evaluations of a cell."""
    folder = options.output_dir / cell.folder
    files = [str(_evaluation(folder, label) / "options.yaml") for label in labels]
    return ["scripts.ablate.evaluate", ablation.file.trainer, *files, *options.flags]


def run_cells(ablation: Ablation, cells: list[Cell], options: RunOptions) -> None:
    """Run cells that are not finished; each has a line of progress when it ends.

    Raises:
        UserError: Cells failed, after all others have ended.
        SystemExit: A signal stopped the ablation; the exit code is 128 plus its number.
    """
    waiting = [cell for cell in cells if not finished(cell, options.output_dir)]
    processes = Processes(options.launcher)
    failed: list[str] = []
    jobs, output_dir = options.jobs, options.output_dir
    with (
        _signals(processes),
        ThreadPoolExecutor(jobs) as pool,
        CellProgress(ablation, len(cells), len(waiting), output_dir, jobs) as progress,
    ):
        futures: dict[Future[float], Cell] = {
            pool.submit(_run_cell, ablation, cell, options, processes): cell for cell in waiting
        }
        for future in as_completed(futures):
            cell = futures[future]
            try:
                progress.done(cell, future.result())
            except StoppedError:
                continue
            except UserError as error:
                failed.append(cell.name)
                log = options.output_dir / cell.folder / LOG
                progress.failed(f"{cell.name} failed: {error} ({log})")
    if processes.signal:
        name = signal.Signals(processes.signal).name
        print(f"stopped by {name}: start the same command again to continue", file=sys.stderr)
        raise SystemExit(128 + processes.signal)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} cells failed: {'; '.join(failed)} (start the same "
            "command again to try them again)"
        )


def _run_cell(ablation: Ablation, cell: Cell, options: RunOptions, processes: Processes) -> float:
    """Train and evaluate a cell, and return the seconds that it took.

    Raises:
        CellError: A process failed, or its files cannot be used.
        StoppedError: The ablation was asked to stop.
    """
    processes.check()
    folder = options.output_dir / cell.folder
    processes.wait_for_others([folder, folder / "evaluate"], cell.name)
    start = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result = read_result(cell, options.output_dir)
        if result is None:
            result = _train(ablation, cell, options, processes)
            result |= {"seconds": time.perf_counter() - start} | _origin(cell, options)
            write_json(folder / "result.json", result)
        if labels := _to_evaluate(cell, result):
            evaluation_start = time.perf_counter()
            result["evaluations"] |= _evaluate(ablation, cell, labels, options, processes)
            result["seconds"] += time.perf_counter() - evaluation_start
            write_json(folder / "result.json", result)
    except (OSError, ValueError, KeyError) as error:
        raise CellError(str(error)) from error
    return time.perf_counter() - start


def _train(
    ablation: Ablation, cell: Cell, options: RunOptions, processes: Processes
) -> dict[str, Any]:
    """Train a cell, or continue its training, and return its result."""
    folder = options.output_dir / cell.folder
    _write_yaml(folder / "options.yaml", dict(cell.options))
    processes.run(folder / LOG, *_training(ablation, cell, options))
    record = training_record(cell, folder)
    if ablation.file.metric not in record["metrics"]:
        raise CellError(f"the last line of {folder / 'log.txt'} has no {ablation.file.metric}")
    return record


def _evaluate(
    ablation: Ablation, cell: Cell, labels: list[str], options: RunOptions, processes: Processes
) -> dict[str, Any]:
    """Evaluate the model of a cell at points, and return the entries of its result."""
    folder = options.output_dir / cell.folder
    folders = {label: _evaluation(folder, label) for label in labels}
    for label, output in folders.items():
        output.mkdir(parents=True, exist_ok=True)
        (output / "eval.json").unlink(missing_ok=True)
        own = {"eval": True, "resume": str(folder / "checkpoint.pth"), "output_dir": str(output)}
        values = {**cell.options, **cell.evaluations[label], **own}
        _write_yaml(output / "options.yaml", values)
    processes.run(folder / LOG, *_evaluations(ablation, cell, labels, options))
    return {
        label: {
            "options": dict(cell.evaluations[label]),
            "metrics": json.loads((output / "eval.json").read_text(encoding="utf-8")),
        }
        for label, output in folders.items()
    }


def _to_evaluate(cell: Cell, result: dict[str, Any] | None = None) -> list[str]:
    """Return the labels of the evaluations that the training does not have, nor the result."""
    return [
        label
        for label in cell.evaluations
        if not cell.is_trained_at(label)
        and (result is None or metric_at(cell, result, label) is None)
    ]


def _evaluation(folder: Path, label: str) -> Path:
    """Return the folder of the evaluation at a point."""
    return folder / "evaluate" / folder_name(label)


def _write_yaml(path: Path, options: dict[str, Any]) -> None:
    """Write options to a YAML file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True))


def _origin(cell: Cell, options: RunOptions) -> dict[str, Any]:
    """Return the machine and versions of a cell."""
    import torch

    asked = options.device or cell.config.device
    on_gpu = asked.startswith("cuda") or (asked == "auto" and torch.cuda.is_available())
    facts = machine(asked if asked.startswith("cuda:") else "cuda" if on_gpu else "cpu")
    facts["threads"] = options.launcher.environment().get("OMP_NUM_THREADS")
    return {"machine": facts, "git": provenance()["git"], "jobs": options.jobs}


@contextmanager
def _signals(processes: Processes) -> Iterator[None]:
    """Forward signals to end to all processes."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def handle(number: int, frame: object) -> None:
        if not processes.signal:
            print("stopping: the cells save their checkpoints", file=sys.stderr, flush=True)
        processes.stop(number)

    before = {
        number: signal.signal(number, handle)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
