"""Measuring the zoo: each row by its trainer's `--eval`, in a process of its own.

A row is finished when its record is in the report. A later call with the same checkpoint and
settings takes it from there, so that an evaluation goes on where it was interrupted.
"""

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine import UserError, provenance
from irpe_core import CheckpointError, load_checkpoint
from irpe_core.download import sha256_of
from irpe_core.mismatch import TABLE
from scripts.benchmark_train import machine
from scripts.zoo.checkpoints import cached, fetch
from scripts.zoo.report import Record, Report, compare, verdict
from scripts.zoo.rows import ROOT, TASKS, Row

__all__ = ["EvalOptions", "evaluate_rows"]

_OUTPUT = "output.txt"
# As `engine.cli` writes it.
_ERROR = re.compile(r"^error(?: \[rank \d+\])?: (.+)$", re.MULTILINE)
_GRACE = 30.0  # seconds that a trainer has to end when it is told to


@dataclass(frozen=True)
class EvalOptions:
    """How rows are evaluated.

    Attributes:
        data: Task → its data; None where it was not given.
        mirror: As for `fetch`.
        nproc: Processes of one evaluation.
        device: As the trainers are told.
        computes_on: What that is on this machine.
        flags: Task → more flags of its trainer.
    """

    data: dict[str, str | None]
    mirror: str | None
    nproc: int
    device: str
    computes_on: torch.device
    flags: dict[str, list[str]]


def evaluate_rows(rows: Sequence[Row], options: EvalOptions, report: Report) -> list[str]:
    """Evaluate rows one after the other; one that cannot be is reported, and the others go on.

    Returns:
        The names of rows that failed or are outside of the tolerance. A row whose checkpoint was
        never published is neither.

    Raises:
        UserError: The report cannot be written.
        KeyboardInterrupt: SIGINT or SIGTERM; what is finished is in the report.
    """
    bad = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number, row in enumerate(rows, 1):
            place = f"[{number}/{len(rows)}] {row.name}:"
            record = _kept(row, options, report)
            if record is None:
                record = _try(row, options, report.folder / row.name, place)
            else:
                print(f"{place} kept from an earlier run", flush=True)
            report.put(row, record)
            print(f"{place} {_summary(row, record)}", flush=True)
            failed = row.checkpoint is not None and verdict(row, record) in ("outside", "not run")
            bad += [row.name] if failed else []
    finally:
        signal.signal(signal.SIGTERM, before)
    return bad


def _settings(row: Row, options: EvalOptions) -> dict[str, Any]:
    """What decides about the figures and their speed, besides the checkpoint."""
    return {
        "config_sha256": hashlib.sha256(row.config_file.read_bytes()).hexdigest(),
        "flags": _flags(row, options),
        "nproc": options.nproc,
        "device": options.computes_on.type,
    }


def _flags(row: Row, options: EvalOptions) -> list[str]:
    task = TASKS[row.task]
    data = str(Path(options.data[row.task] or "").resolve())
    flags = ["--eval", task.data_flag, data, "--device", options.device, *task.protocol]
    return flags + options.flags[row.task]


def _kept(row: Row, options: EvalOptions, report: Report) -> Record | None:
    """The record of an earlier run with the same checkpoint and settings.

    Without data nothing can be measured anew, and any settings do.
    """
    record = report.records.get(row.name)
    if record is None or record.reason or record.checkpoint != row.checkpoint:
        return None
    if options.data[row.task]:
        if record.settings != _settings(row, options):
            return None
        # It is what is asked for, whatever became of other settings meanwhile.
        record = replace(record, failed_later="")
    file = cached(row)
    return record if file is None or sha256_of(file) == record.sha256 else None


def _try(row: Row, options: EvalOptions, folder: Path, place: str) -> Record:
    """Evaluate a row, or say why it cannot be."""
    try:
        return _evaluate(row, options, folder, place)
    except (UserError, CheckpointError) as error:
        reason = " ".join(str(error).split())
    except OSError as error:
        reason = f"cannot write {error.filename or folder}: {error.strerror or error}"
    return Record(reason=reason, checkpoint=row.checkpoint or "")


def _evaluate(row: Row, options: EvalOptions, folder: Path, place: str) -> Record:
    task = TASKS[row.task]
    if row.checkpoint is None:
        raise UserError("its checkpoint is not published")
    data = options.data[row.task]
    # Before the download, which may be long.
    if not data:
        raise UserError(f"{task.option} is not given, where its data lies")
    if not Path(data).is_dir():
        raise UserError(f"{task.option} {data} is not a folder")
    checkpoint = fetch(row, options.mirror)
    _check_tables(row, checkpoint)
    settings = _settings(row, options)
    print(f"{place} evaluating, what it says goes to {folder / _OUTPUT}", flush=True)
    figures = _run_trainer(row, checkpoint, options, folder)
    return Record(
        measured={name: figures[figure.key] for name, figure in task.figures.items()},
        images=figures["images"],
        images_per_s=figures["images_per_s"],
        checkpoint=row.checkpoint,
        sha256=sha256_of(checkpoint),
        settings=settings,
        machine=_machine(options),
    )


def _check_tables(row: Row, checkpoint: Path) -> None:
    """Raises CheckpointError where the trainer would take weights without iRPE for the row's."""
    if row.rpe is None:
        return
    if not any(map(TABLE.search, load_checkpoint(checkpoint)["model"])):
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} has no iRPE, the row has it on "
            f"{', '.join(row.rpe.rpe_on)}: its tables would keep their initial values"
        )


def _run_trainer(
    row: Row, checkpoint: Path, options: EvalOptions, folder: Path
) -> dict[str, float]:
    """The trainer's `eval.json`; raises UserError with the trainer's own sentence."""
    figures, output = folder / "eval.json", folder / _OUTPUT
    folder.mkdir(parents=True, exist_ok=True)
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m"]
    if options.nproc > 1:
        command += ["torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={options.nproc}", "-m"]
    command += [f"{row.task}.main", "--config", str(row.config_file.resolve())]
    command += ["--resume", str(checkpoint.resolve()), "--output-dir", str(folder.resolve())]
    with _started([*command, *_flags(row, options)], output) as process:
        code = process.wait()
    if code == 0 and figures.is_file():
        return json.loads(figures.read_text(encoding="utf-8"))
    said = _ERROR.search(output.read_text(encoding="utf-8", errors="replace"))
    if said:
        raise UserError(said[1])
    ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    raise UserError(f"{row.task}.main ended with {ending}; what it said is in {output}")


@contextmanager
def _started(command: list[str], output: Path) -> Iterator[subprocess.Popen]:
    """A command that writes to a file, and that does not outlive the context."""
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _machine(options: EvalOptions) -> dict[str, Any]:
    facts = machine(options.computes_on)
    named = {name: str(facts[name]) for name in ("device", "torch", "timm")}
    return named | {"processes": options.nproc, "git": provenance()["git"]}


def _summary(row: Row, record: Record) -> str:
    if record.reason:
        return f"not run: {record.reason}"
    figures = []
    for name, comparison in compare(row, record).items():
        figure = TASKS[row.task].figures[name]
        shown = f"{figure.heading} {comparison.measured:.{figure.decimals + 1}f}"
        figures.append(f"{shown} (published {figure.show(comparison.published)})")
    return f"{', '.join(figures)}: {verdict(row, record)}"
