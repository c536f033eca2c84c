"""The rows of the zoo, from `configs/zoo.yaml`, and what all rows of a task have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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

__all__ = ["ROOT", "TASKS", "ZOO", "Figure", "Row", "Task", "Zoo", "file_name", "load_zoo"]

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "configs" / "zoo.yaml"


def file_name(address: str) -> str:
    """The last part of an address, by which the torch hub cache knows a file."""
    return Path(urlsplit(address).path).name


class Figure(NamedTuple):
    """A column of the published tables.

    Attributes:
        heading: In a table.
        decimals: As many as are published.
        key: Of the measured figure in a trainer's `eval.json`.
    """

    heading: str
    decimals: int
    key: str = ""

    def show(self, value: float | None) -> str:
        """The value as it is published, a dash for none."""
        return "—" if value is None else f"{value:.{self.decimals}f}"


@dataclass(frozen=True)
class Task:
    """What all rows of a task have in common.

    Attributes:
        option: Of this command, where the data lies; `data_flag` is the trainer's.
        costs: Figures that follow from the model, by their names in zoo.yaml.
        figures: Figures that are measured on the data, likewise.
        tolerance: Largest difference from a published figure that counts as the same.
        protocol: Flags of the published evaluation.
    """

    option: str
    data_flag: str
    costs: dict[str, Figure]
    figures: dict[str, Figure]
    tolerance: float
    protocol: tuple[str, ...] = ()


TASKS = {
    "classification": Task(
        option="--imagenet",
        data_flag="--data-path",
        costs={"params": Figure("#Params (M)", 2), "macs": Figure("MACs (M)", 0)},
        figures={
            "top1": Figure("top-1", 1, "test_acc1"),
            "top5": Figure("top-5", 1, "test_acc5"),
        },
        tolerance=0.1,
    ),
    "detection": Task(
        option="--coco",
        data_flag="--coco-path",
        costs={},
        figures={
            name: Figure(name, 3, f"test_{name}")
            for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
        },
        tolerance=0.002,
        # Two images a process, padded to the larger: the figures move with the padding.
        protocol=("--eval-padding", "--batch-size", "2"),
    ),
}


class _Facts(BaseModel):
    """What the file says of a row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str | None = None
    checkpoint: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")
    published: dict[str, float] = {}


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    classification: dict[str, _Facts] = {}
    detection: dict[str, _Facts] = {}

    @model_validator(mode="after")
    def _known_figures(self) -> "_File":
        for task, facts in TASKS.items():
            known = [*facts.costs, *facts.figures]
            for name, row in getattr(self, task).items():
                for figure in row.published.keys() - known:
                    raise ValueError(
                        f"{task}, {name}, published: {figure!r} is none of {', '.join(known)}"
                    )
        if shared := self.classification.keys() & self.detection.keys():
            raise ValueError(f"{min(shared)!r} is the name of two rows")
        return self

    @model_validator(mode="after")
    def _own_places_in_the_cache(self) -> "_File":
        addresses: dict[str, str] = {}
        for facts in [*self.classification.values(), *self.detection.values()]:
            address = facts.checkpoint or ""
            other = addresses.setdefault(file_name(address), address)
            if other != address:
                raise ValueError(
                    f"{other} and {address} would be one file in the cache of checkpoints"
                )
        return self


@dataclass(frozen=True)
class Row:
    """A row of the zoo.

    Attributes:
        name: Of the row.
        task: Which of `TASKS`.
        config_file: The trainer's configuration.
        sha256: Of the checkpoint, where it is known.
        published: Figures by their names in zoo.yaml.
    """

    name: str
    task: Literal["classification", "detection"]
    config_file: Path
    sha256: str | None
    published: dict[str, float]
    own_checkpoint: str | None

    @cached_property
    def config(self) -> ClassificationConfig | DetectionConfig:
        """The trainer's configuration; one that cannot be read ends the program with its reason."""
        parse = classification_config if self.task == "classification" else detection_config
        return parse(["--config", str(self.config_file)])

    @property
    def checkpoint(self) -> str | None:
        """Its address; None where none is published."""
        if self.own_checkpoint or self.task == "detection":
            return self.own_checkpoint
        return default_cfgs.get(self.config.model, {}).get("url") or None

    @property
    def rpe(self) -> RPEConfig | None:
        """The encoding in its attention, without skipped tokens; None for none."""
        if self.task == "detection":
            return parse_rpe_spec(self.config.enc_rpe2d)
        published = PUBLISHED.get(self.config.model)
        return parse_rpe_spec(published[1] if published else self.config.rpe)


@dataclass(frozen=True)
class Zoo:
    """All rows, and where their figures were published."""

    file: Path
    source: str
    rows: tuple[Row, ...]

    def choose(self, names: Sequence[str] | None, *, with_checkpoint: bool = False) -> list[Row]:
        """The rows of the given names, in the zoo's order; a task stands for all of its rows.

        Args:
            names: Rows and tasks; None for all.
            with_checkpoint: Whether a row that is named has to have a checkpoint.

        Raises:
            UsageError: There is no such row, or no checkpoint; says which there are.
        """
        rows = {row.name: row for row in self.rows}
        for name in names or ():
            if name not in rows and name not in TASKS:
                raise UsageError(
                    f"--rows: {name!r} is no row of {self.file}; its rows are {', '.join(rows)}, "
                    f"and {' or '.join(TASKS)} stands for all rows of a task"
                )
            if with_checkpoint and name in rows and rows[name].checkpoint is None:
                raise UsageError(f"--rows: {name!r} has no published checkpoint")
        return [row for row in self.rows if not names or {row.name, row.task} & set(names)]


def load_zoo(file: Path = ZOO) -> Zoo:
    """Read the table of a zoo; a row's configuration is looked for beside it.

    Raises:
        UsageError: The file is missing, or its first mistake.
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
        )
        for task in TASKS
        for name, facts in getattr(content, task).items()
    ]
    for row in rows:
        if not row.config_file.is_file():
            raise UsageError(
                f"{file}: {row.task}, {row.name}: its configuration {row.config_file} is not there"
            )
    return Zoo(file, content.source.strip(), tuple(rows))
