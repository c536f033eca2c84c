"""Evaluation of the zoo: `--eval` of a row's trainer, in a separate process per row.

A row is finished when its record is in the report. A later call with the same checkpoint and
settings reuses the record, so an interrupted evaluation continues with the next row.
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
from engine.provenance import machine
from irpe_core import CheckpointError, load_checkpoint
from irpe_core.download import sha256_of
from irpe_core.mismatch import TABLE
from scripts.zoo.checkpoints import cached, fetch
from scripts.zoo.report import Record, Report, compare, verdict
from scripts.zoo.rows import ROOT, TASKS, Row

__all__ = ["EvalOptions", "evaluate_rows"]

_OUTPUT = "output.txt"
# The form in which `engine.cli` prints an error.
_ERROR = re.compile(r"^error(?: \[rank \d+\])?: (.+)$", re.MULTILINE)
_GRACE = 30.0  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class EvalOptions:
    """Options of an evaluation.

    Attributes:
        data: Task → folder of its data set; None if not given.
        mirror: Folder or URL of checkpoints, as for `fetch`.
        nproc: Number of processes.
        device: Option `--device` of the trainers.
        resolved_device: Device that `device` selects on this machine.
        flags: Task → further flags for its trainer.
    """

    data: dict[str, str | None]
    mirror: str | None
    nproc: int
    device: str
    resolved_device: torch.device
    flags: dict[str, list[str]]


def evaluate_rows(rows: Sequence[Row], options: EvalOptions, report: Report) -> list[str]:
    """Evaluate rows one after the other; a failure is reported and the next row follows.

    Args:
        rows: Rows to evaluate.
        options: Options of the evaluation.
        report: Report that receives a record of every row.

    Returns:
        Names of the rows that failed or are outside the tolerance. A row without a published
        checkpoint is not among them.

    Raises:
        UserError: The report cannot be written.
        KeyboardInterrupt: SIGINT or SIGTERM arrived; the report has all finished rows.
    """
    bad = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number, row in enumerate(rows, 1):
            prefix = f"[{number}/{len(rows)}] {row.name}:"
            record = _kept(row, options, report)
            if record is None:
                record = _try(row, options, report.folder / row.name, prefix)
            else:
                print(f"{prefix} kept from an earlier run", flush=True)
            report.put(row, record)
            print(f"{prefix} {_summary(row, record)}", flush=True)
            failed = row.checkpoint is not None and verdict(row, record) in ("outside", "not run")
            bad += [row.name] if failed else []
    finally:
        signal.signal(signal.SIGTERM, before)
    return bad


def _settings(row: Row, options: EvalOptions) -> dict[str, Any]:
    """Return the settings that, with the checkpoint, determine metrics and speed."""
    return {
        "config_sha256": hashlib.sha256(row.config_file.read_bytes()).hexdigest(),
        "flags": _flags(row, options),
        "nproc": options.nproc,
        "device": options.resolved_device.type,
    }


def _flags(row: Row, options: EvalOptions) -> list[str]:
    """Return the flags of the trainer, without those that name the row."""
    task = TASKS[row.task]
    data = str(Path(options.data[row.task] or "").resolve())
    flags = ["--eval", task.data_flag, data, "--device", options.device, *task.protocol]
    return flags + options.flags[row.task]


def _kept(row: Row, options: EvalOptions, report: Report) -> Record | None:
    """Return the record of an earlier run with the same checkpoint and settings, if there is one.

    Without the data set the row cannot be evaluated again, so the settings are not compared.
    """
    record = report.records.get(row.name)
    if record is None or record.reason or record.checkpoint != row.checkpoint:
        return None
    if options.data[row.task]:
        if record.settings != _settings(row, options):
            return None
        # A later failure came from other settings than these.
        record = replace(record, failed_later="")
    file = cached(row)
    return record if file is None or sha256_of(file) == record.sha256 else None


def _try(row: Row, options: EvalOptions, folder: Path, prefix: str) -> Record:
    """Evaluate a row, or return a record with the reason of the failure."""
    try:
        return _evaluate(row, options, folder, prefix)
    except (UserError, CheckpointError) as error:
        reason = " ".join(str(error).split())
    except OSError as error:
        reason = f"cannot write {error.filename or folder}: {error.strerror or error}"
    return Record(reason=reason, checkpoint=row.checkpoint or "")


def _evaluate(row: Row, options: EvalOptions, folder: Path, prefix: str) -> Record:
    """Evaluate a row.

    Raises:
        UserError: The data set is missing, or the trainer failed.
        CheckpointError: The checkpoint is not available, or has no iRPE.
        OSError: A file cannot be written.
    """
    task = TASKS[row.task]
    if row.checkpoint is None:
        raise UserError("its checkpoint is not published")
    data = options.data[row.task]
    # Checked before the download, which can take long.
    if not data:
        raise UserError(f"{task.option} must be a folder, got none")
    if not Path(data).is_dir():
        raise UserError(f"{task.option} must be a folder, got {data}")
    checkpoint = fetch(row, options.mirror)
    _check_has_rpe(row, checkpoint)
    settings = _settings(row, options)
    print(f"{prefix} evaluating, output in {folder / _OUTPUT}", flush=True)
    metrics = _run_trainer(row, checkpoint, options, folder)
    return Record(
        measured={name: metrics[column.key] for name, column in task.metrics.items()},
        images=metrics["images"],
        images_per_s=metrics["images_per_s"],
        checkpoint=row.checkpoint,
        sha256=sha256_of(checkpoint),
        settings=settings,
        machine=_machine(options),
    )


def _check_has_rpe(row: Row, checkpoint: Path) -> None:
    """Raise CheckpointError if the row has iRPE but the checkpoint does not.

    The trainer accepts such a checkpoint and evaluates tables with their initial values.
    """
    if row.rpe is None:
        return
    if not any(map(TABLE.search, load_checkpoint(checkpoint)["model"])):
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} must have iRPE on {', '.join(row.rpe.rpe_on)}, "
            "got none: the tables would keep their initial values"
        )


def _run_trainer(
    row: Row, checkpoint: Path, options: EvalOptions, folder: Path
) -> dict[str, float]:
    """Run the trainer and return its `eval.json`.

    Raises:
        UserError: The trainer failed; the message is the trainer's own.
    """
    results, output = folder / "eval.json", folder / _OUTPUT
    folder.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m"]
    if options.nproc > 1:
        command += ["torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={options.nproc}", "-m"]
    command += [f"{row.task}.main", "--config", str(row.config_file.resolve())]
    command += ["--resume", str(checkpoint.resolve()), "--output-dir", str(folder.resolve())]
    with _started([*command, *_flags(row, options)], output) as process:
        code = process.wait()
    if code == 0 and results.is_file():
        return json.loads(results.read_text(encoding="utf-8"))
    error = _ERROR.search(output.read_text(encoding="utf-8", errors="replace"))
    if error:
        raise UserError(error[1])
    ending = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    raise UserError(f"{row.task}.main ended with {ending}; its output is in {output}")


@contextmanager
def _started(command: list[str], output: Path) -> Iterator[subprocess.Popen]:
    """Start a command whose output goes to a file, and end it when the context ends."""
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
    """Return the device, the versions and the git revision of this evaluation."""
    facts = machine(options.resolved_device)
    named = {name: str(facts[name]) for name in ("device", "torch", "timm")}
    return named | {"processes": options.nproc, "git": provenance()["git"]}


def _summary(row: Row, record: Record) -> str:
    """Return the outcome of a row in one line."""
    if record.reason:
        return f"not run: {record.reason}"
    metrics = []
    for name, comparison in compare(row, record).items():
        column = TASKS[row.task].metrics[name]
        shown = f"{column.heading} {comparison.measured:.{column.decimals + 1}f}"
        metrics.append(f"{shown} (published {column.show(comparison.published)})")
    return f"{', '.join(metrics)}: {verdict(row, record)}"
