"""The clients that `--logger` names: TensorBoard, Weights & Biases and MLflow.

Each is a thin layer over the library's own client, which reads its settings (server, project, mode)
from its own environment variables. Only the main process opens loggers. A resumed run continues the
run of the service: `loggers.json` in the output folder keeps its id.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.errors import UserError
from engine.optional import require

__all__ = ["LOGGERS", "RunLogger", "check_loggers", "open_loggers"]

_IDS = "loggers.json"

Pictures = Mapping[str, Sequence[np.ndarray]]


class RunLogger(ABC):
    """A client of a logging service, for one run.

    Args:
        folder: Output folder of the run.
        config: Options of the run, as plain values.
        start_step: Number of optimizer steps done in all epochs, 0 for a new run.
        run_id: Id of the run to continue; None starts one.

    Attributes:
        run_id: Id of the run; None for a service without ids.
    """

    run_id: str | None = None

    @abstractmethod
    def __init__(
        self, folder: Path, config: Mapping[str, Any], start_step: int, run_id: str | None
    ) -> None: ...

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""

    @abstractmethod
    def images(self, pictures: Pictures, step: int) -> None:
        """Add pictures, each a `(H, W, 3)` uint8 array, in lists by name."""

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """Send what is in memory, and end the run."""


class _TensorBoard(RunLogger):
    """Event files in `tensorboard/` of the output folder."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], start_step: int, run_id: str | None
    ) -> None:
        # This import takes seconds, and only the main process needs it.
        from torch.utils.tensorboard import SummaryWriter

        purge = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        if config:
            # Four spaces make a block of code in Markdown.
            text = yaml.safe_dump(dict(config), sort_keys=False)
            text = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text("config", text, start_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if any(name.startswith("test/") for name in values):
            self._writer.flush()

    def images(self, pictures: Pictures, step: int) -> None:
        """Add pictures."""
        for name, arrays in pictures.items():
            for number, array in enumerate(arrays):
                self._writer.add_image(f"{name}/{number}", array, step, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """End the run."""
        self._writer.close()


class _Wandb(RunLogger):
    """A run of Weights & Biases."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], start_step: int, run_id: str | None
    ) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            dir=str(folder),
            name=folder.resolve().name,
            config=dict(config),
            id=run_id,
            resume="allow" if run_id else None,
            allow_val_change=True,
        )
        self.run_id = self._run.id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""
        self._run.log(dict(values), step=step)

    def images(self, pictures: Pictures, step: int) -> None:
        """Add pictures."""
        lists = {
            name: [self._image(array) for array in arrays] for name, arrays in pictures.items()
        }
        self._run.log(lists, step=step)

    def close(self, failed: bool = False) -> None:
        """End the run."""
        self._run.finish(exit_code=int(failed))


class _Mlflow(RunLogger):
    """A run of MLflow."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], start_step: int, run_id: str | None
    ) -> None:
        import mlflow

        self._client = mlflow
        run = mlflow.start_run(run_id=run_id, run_name=folder.resolve().name)
        self.run_id = run.info.run_id
        # MLflow refuses other values for the parameters of an existing run.
        if run_id is None:
            mlflow.log_params(dict(config))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add points to curves."""
        self._client.log_metrics(dict(values), step=step)

    def images(self, pictures: Pictures, step: int) -> None:
        """Add pictures."""
        for name, arrays in pictures.items():
            for number, array in enumerate(arrays):
                self._client.log_image(array, key=f"{name}/{number}", step=step)

    def close(self, failed: bool = False) -> None:
        """End the run."""
        self._client.end_run(status="FAILED" if failed else "FINISHED")


LOGGERS: dict[str, type[RunLogger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}


def check_loggers(names: Iterable[str]) -> None:
    """Check that the packages of loggers are installed.

    Raises:
        UserError: One is missing.
    """
    for name in names:
        require(name, f"--logger {name}")


def open_loggers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], start_step: int
) -> dict[str, RunLogger]:
    """Open the loggers of a run, by name.

    Args:
        names: Names in `LOGGERS`.
        folder: Output folder of the run.
        config: Options of the run, as plain values.
        start_step: Number of optimizer steps done in all epochs, 0 for a new run.

    Raises:
        UserError: A package is missing, or a service refuses the run.
    """
    check_loggers(names)
    ids = _read_ids(folder / _IDS) if start_step else {}
    opened: dict[str, RunLogger] = {}
    for name in names:
        try:
            opened[name] = LOGGERS[name](folder, config, start_step, ids.get(name))
        except Exception as error:
            # The clients raise exceptions of many kinds: no login, no server, a deleted run.
            for each in opened.values():
                each.close(failed=True)
            raise UserError(f"--logger {name}: {error}") from error
    new = {name: each.run_id for name, each in opened.items() if each.run_id}
    if new:
        (folder / _IDS).write_text(json.dumps(ids | new) + "\n", encoding="utf-8")
    return opened


def _read_ids(path: Path) -> dict[str, str]:
    """Return the ids of the runs to continue, by logger."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
