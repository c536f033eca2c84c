"""Rows of the zoo, read from `configs/zoo.yaml`, and facts common to all rows of a task."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from classification.config import ClassificationConfig
from classification.config import parse_args as classification_config
from classification.models import PUBLISHED, default_cfgs
from detection.config import DetectionConfig
from detection.config import parse_args as detection_config
from engine import UsageError
from irpe_core import RPEConfig, parse_rpe_spec

__all__ = [
    "ROOT",
    "TASKS",
    "ZOO",
    "Column",
    "Logs",
    "Row",
    "Task",
    "Zoo",
    "file_name",
    "load_zoo",
    "logs_of",
]

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "configs" / "zoo.yaml"


def file_name(url: str) -> str:
    """Return the last part of a URL's path, the name of the file in the torch hub cache."""
    return Path(urlsplit(url).path).name


class Logs(NamedTuple):
    """URLs of the two logs of a published training.

    Attributes:
        log: Log as JSON lines, `log_<name>.txt`.
        detail: Detailed log as text, `detail_<name>.log`.
    """

    log: str
    detail: str


def logs_of(checkpoint: str) -> Logs:
    """Return the URLs of the logs that are published with a checkpoint.

    The logs are in the folder of the checkpoint, and `<name>` is its file name without `.pth`.
    """
    url = urlsplit(checkpoint)
    path = PurePosixPath(url.path)
    names = (f"log_{path.stem}.txt", f"detail_{path.stem}.log")
    return Logs(*(url._replace(path=str(path.with_name(name))).geturl() for name in names))


class Column(NamedTuple):
    """A column of the published tables: parameters, MACs or a metric.

    Attributes:
        heading: Heading of the column.
        decimals: Number of decimals, as published.
        key: Key of a metric in the trainer's `eval.json`.
    """

    heading: str
    decimals: int
    key: str = ""

    def show(self, value: float | None) -> str:
        """Format a value as it is published; None gives a dash."""
        return "—" if value is None else f"{value:.{self.decimals}f}"


@dataclass(frozen=True)
class Task:
    """Facts common to all rows of a task.

    Attributes:
        option: Option of `evaluate` for the folder of the data set.
        data_flag: Option of the trainer for the same folder.
        costs: Parameters and MACs, by their names in zoo.yaml.
        metrics: Metrics of an evaluation, by their names in zoo.yaml.
        tolerance: Largest accepted difference from a published metric.
        protocol: Flags of the trainer for the published evaluation.
    """

    option: str
    data_flag: str
    costs: dict[str, Column]
    metrics: dict[str, Column]
    tolerance: float
    protocol: tuple[str, ...] = ()


TASKS = {
    "classification": Task(
        option="--imagenet",
        data_flag="--data-path",
        costs={"params": Column("#Params (M)", 2), "macs": Column("MACs (M)", 0)},
        metrics={
            "top1": Column("top-1", 1, "test_acc1"),
            "top5": Column("top-5", 1, "test_acc5"),
        },
        tolerance=0.1,
    ),
    "detection": Task(
        option="--coco",
        data_flag="--coco-path",
        costs={},
        metrics={
            name: Column(name, 3, f"test_{name}")
            for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
        },
        tolerance=0.002,
        # The metrics depend on the padding: two images per process, padded to the larger one.
        protocol=("--eval-padding", "--batch-size", "2"),
    ),
}


class _Facts(BaseModel):
    """Entry of a row in the file of a zoo."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str | None = None
    checkpoint: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")
    published: dict[str, float] = {}


class _File(BaseModel):
    """Content of the file of a zoo."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    logs: bool = False
    classification: dict[str, _Facts] = {}
    detection: dict[str, _Facts] = {}

    @model_validator(mode="after")
    def _check_names(self) -> "_File":
        """Check the names of rows and of their published values."""
        for task, facts in TASKS.items():
            known = [*facts.costs, *facts.metrics]
            for name, row in getattr(self, task).items():
                for column in row.published.keys() - known:
                    raise ValueError(
                        f"{task}, {name}, published: keys must be among {', '.join(known)}, "
                        f"got {column!r}"
                    )
        if shared := self.classification.keys() & self.detection.keys():
            raise ValueError(f"names of rows must be unique, got {min(shared)!r} twice")
        return self

    @model_validator(mode="after")
    def _check_file_names(self) -> "_File":
        """Check that different checkpoints have different names in the cache."""
        urls: dict[str, str] = {}
        for facts in [*self.classification.values(), *self.detection.values()]:
            url = facts.checkpoint or ""
            other = urls.setdefault(file_name(url), url)
            if other != url:
                raise ValueError(f"file names of checkpoints must be unique, got {other} and {url}")
        return self


@dataclass(frozen=True)
class Row:
    """A row of the zoo.

    Attributes:
        name: Name of the row.
        task: Name of its task in `TASKS`.
        config_file: Path of the trainer's configuration.
        sha256: SHA-256 of the checkpoint, if it is known.
        published: Published parameters, MACs and metrics, by their names in zoo.yaml.
        own_checkpoint: URL of the checkpoint in zoo.yaml, if it has one.
        has_logs: Whether logs are published with the checkpoint.
    """

    name: str
    task: Literal["classification", "detection"]
    config_file: Path
    sha256: str | None
    published: dict[str, float]
    own_checkpoint: str | None
    has_logs: bool

    @cached_property
    def config(self) -> ClassificationConfig | DetectionConfig:
        """The trainer's configuration; UsageError if the file is invalid."""
        parse = classification_config if self.task == "classification" else detection_config
        return parse(["--config", str(self.config_file)])

    @property
    def checkpoint(self) -> str | None:
        """URL of the checkpoint; None if none is published."""
        if self.own_checkpoint or self.task == "detection":
            return self.own_checkpoint
        registered = default_cfgs.get(self.config.model)
        return (registered.default.url or None) if registered else None

    @property
    def logs(self) -> Logs | None:
        """URLs of the logs of its training; None if none are published."""
        return logs_of(self.checkpoint) if self.has_logs and self.checkpoint else None

    @property
    def rpe(self) -> RPEConfig | None:
        """The iRPE of its attention, without skipped tokens; None without iRPE."""
        if self.task == "detection":
            return parse_rpe_spec(self.config.enc_rpe2d)
        published = PUBLISHED.get(self.config.model)
        return parse_rpe_spec(published[1] if published else self.config.rpe)


@dataclass(frozen=True)
class Zoo:
    """All rows of a zoo.

    Attributes:
        file: Path of the file that was read.
        source: Publication of the metrics, in words.
        rows: Rows in the order of the file, classification first.
    """

    file: Path
    source: str
    rows: tuple[Row, ...]

    def choose(self, names: Sequence[str] | None, *, with_checkpoint: bool = False) -> list[Row]:
        """Return the rows of the given names, in the order of the zoo.

        Args:
            names: Names of rows, and of tasks for all rows of a task; None for all rows.
            with_checkpoint: Refuse names of rows without a checkpoint.

        Raises:
            UsageError: A name is unknown, or its row has no checkpoint.
        """
        rows = {row.name: row for row in self.rows}
        for name in names or ():
            if name not in rows and name not in TASKS:
                raise UsageError(
                    f"--rows must be rows of {self.file} ({', '.join(rows)}) or tasks "
                    f"({', '.join(TASKS)}), got {name!r}"
                )
            if with_checkpoint and name in rows and rows[name].checkpoint is None:
                raise UsageError(f"--rows must have a published checkpoint, got {name!r}")
        return [row for row in self.rows if not names or {row.name, row.task} & set(names)]


def load_zoo(file: Path = ZOO) -> Zoo:
    """Read the file of a zoo.

    Args:
        file: YAML file; paths of configurations are relative to its folder.

    Raises:
        UsageError: The file or a configuration is missing, or the content is invalid.
    """
    try:
        content = _File.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"--zoo {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--zoo {file}: not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{line}: not valid YAML") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ", ".join(map(str, first["loc"])) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{file}: {place}: {message}") from error
    rows = [
        Row(
            name,
            task,
            file.parent / (facts.config or f"{task}/{name}.yaml"),
            facts.sha256,
            facts.published,
            facts.checkpoint,
            content.logs,
        )
        for task in TASKS
        for name, facts in getattr(content, task).items()
    ]
    for row in rows:
        if not row.config_file.is_file():
            raise UsageError(
                f"{file}: {row.task}, {row.name}: configuration {row.config_file} does not exist"
            )
    return Zoo(file, content.source.strip(), tuple(rows))
