"""The parts that the commands for prediction share: weights, batches and outputs."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine.checkpoint import check_writable, replacing
from engine.errors import UsageError, UserError
from engine.exported import ExportedModel, open_exported
from engine.flags import flag_of
from engine.launcher import launched_as
from engine.predict_config import PredictConfig
from engine.workers import shield_worker

__all__ = [
    "check_outputs",
    "class_names",
    "open_for_task",
    "predict_files",
    "printable",
    "require_all",
    "select_weights",
    "start_prediction",
    "write_output",
]

logger = logging.getLogger(__name__)


def start_prediction() -> None:
    """Start logging to stderr, so that stdout has only results.

    Raises:
        UsageError: Several processes were started.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if (world_size := launched_as()[2]) > 1:
        raise UsageError(f"prediction must run in one process, got {world_size}")


def check_outputs(paths: Iterable[Path], *, force: bool) -> None:
    """Check that the outputs can be written, before the prediction.

    Raises:
        UsageError: A file exists, and `force` is False.
        UserError: A folder cannot be written.
    """
    paths = list(paths)
    existing = [path for path in paths if path.exists()]
    if existing and not force:
        others = f" and {len(existing) - 1} others" if len(existing) > 1 else ""
        raise UsageError(f"{existing[0]}{others} must not exist: --force overwrites")
    for folder in {path.parent for path in paths}:
        check_writable(folder)


def write_output(path: Path, text: str) -> None:
    """Write a text file atomically, also with file names that are not valid UTF-8.

    Raises:
        UserError: The file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def predict_files(
    files: Dataset[Any],
    predict: Callable[[list[tuple[int, Any]]], None],
    config: PredictConfig,
) -> int:
    """Read all files in batches with a progress bar, and predict those that can be read.

    Args:
        files: Data set of samples; an exception instead of a sample is reported.
        predict: Function of a batch of (index, sample).
        config: The options.

    Returns:
        The number of files that could not be read.
    """
    # A single batch is read faster without starting processes.
    workers = min(config.num_workers, os.cpu_count() or 1) if len(files) > config.batch_size else 0
    loader = DataLoader(
        files,
        batch_size=config.batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=shield_worker,
    )
    bad, start = 0, 0
    with tqdm(total=len(files), unit="image", disable=None) as bar:
        for batch in loader:
            good = []
            for index, sample in enumerate(batch, start):
                if isinstance(sample, Exception):
                    bar.write(f"skipped: {sample}", file=sys.stderr)
                    bad += 1
                else:
                    good.append((index, sample))
            if good:
                predict(good)
            start += len(batch)
            bar.update(len(batch))
    return bad


def require_all(bad: int, total: int) -> None:
    """Raise UserError, at the end of a command, if some images could not be read."""
    if bad:
        raise UserError(f"{bad} of {total} images could not be read and were skipped, see above")


def select_weights(
    checkpoint: Mapping[str, Any], source: str, *, use_ema: bool | None
) -> Mapping[str, Tensor]:
    """Return the weights of a checkpoint to predict with.

    Args:
        checkpoint: The checkpoint.
        source: Its path or URL, for error messages.
        use_ema: Use the EMA; None uses it if there is one, that is, if `--eval` evaluates it.

    Raises:
        UserError: The EMA is requested, but there is none.
    """
    ema = checkpoint.get("model_ema")
    if use_ema and ema is None:
        raise UserError(f"--use-ema: {source} has no EMA weights (model_ema)")
    if ema is None or use_ema is False:
        return checkpoint["model"]
    logger.info("weights: EMA; --no-use_ema selects the others")
    share = _start_share(checkpoint)
    if share > 0.1:
        logger.warning(
            "the EMA still has %.0f %% of the weights that training started with: compare with "
            "--no-use_ema",
            100 * share,
        )
    return ema


def open_for_task(
    source: str, task: str, *, device: str, dtype: str, options: Mapping[str, Any]
) -> ExportedModel:
    """Open an exported file to predict with.

    Args:
        source: Path of the file.
        task: Task that its metadata must have.
        device: Device that the user selects.
        dtype: Data type that the user selects.
        options: Options of the model that the user gives.

    Raises:
        UsageError: An option does not apply to exported files.
        UserError: The file cannot be read, or is of another task.
    """
    if device not in ("auto", "cpu") or dtype not in ("auto", "float32"):
        raise UsageError(
            f"{source} runs on the CPU in float32: --device must be auto or cpu and --dtype auto "
            f"or float32, got {device} and {dtype}"
        )
    if options:
        flag = flag_of(next(iter(options)))
        raise UsageError(f"{flag} has no effect on {source}, which is exported")
    exported = open_exported(source)
    found = exported.metadata.get("task", "none: export it again with scripts.export")
    if found != task:
        raise UserError(f"{source} must have the task {task} in its metadata, got {found}")
    return exported


def class_names(
    given: str | Path | Sequence[str] | None,
    known: Sequence[str] | None,
    count: int | None,
    source: str,
) -> list[str]:
    """Return the class name of each label.

    Args:
        given: Names, or a text file with one name per line; None or empty uses `known`.
        known: Names in the checkpoint; None if it has none.
        count: Number of classes; None if the model does not tell.
        source: Path or URL of the checkpoint, for error messages.

    Raises:
        UserError: There are no names, their number is wrong, or the file cannot be read.
    """
    if isinstance(given, str | Path) and given:
        try:
            given = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {given}: {error}") from error
    names = list(given or known or ())
    if not names:
        lines = "a line" if count is None else f"{count} lines, one"
        raise UserError(
            f"{source} has no class names: --classes must be a text file with {lines} per class"
        )
    if count is not None and len(names) != count:
        raise UserError(f"--classes must be {count} names, as {source} has, got {len(names)}")
    return names


def printable(name: str) -> str:
    """Return a file name with a replacement for bytes that are not valid UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _start_share(checkpoint: Mapping[str, Any]) -> float:
    """Return the share of the first weights in the EMA of a checkpoint; 0 if it is unknown."""
    decay = (checkpoint.get("args") or {}).get("model_ema_decay")
    try:
        states = checkpoint["optimizer"]["state"].values()
        return float(decay) ** max(float(state["step"]) for state in states if "step" in state)
    # Entries of another kind: the optimizer of a foreign file is checked only to resume.
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError):
        return 0.0
