"""The cells of an ablation: one training for each variant, training point and seed.

All mistakes in the file are found here, before anything runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine import RunConfig, UsageError, dump
from engine.config import make_config, read_config
from engine.flags import suggest
from scripts.ablate.file import AblationFile, folder_name, read_file
from scripts.ablate.trainers import TRAINERS, build, metrics_of, model_options

__all__ = ["Ablation", "Cell", "check_models", "check_recorded", "load_ablation"]

Options = Mapping[str, Any]

# The ablation sets these for each cell.
_RESERVED = (
    *("seed", "output_dir", "resume", "auto_resume", "overwrite", "eval", "start_epoch"),
    *("world_size", "dist_url"),
)


@dataclass(frozen=True)
class Cell:
    """One training, and the evaluations of its model.

    Attributes:
        variant: Label of the variant.
        point: Label of the point of training; empty without `train_at`.
        seed: Random seed.
        options: Options that differ from the trainer's defaults.
        config: All options, validated by the trainer.
        evaluations: Options of each evaluation by the label of its point, as differences.
    """

    variant: str
    point: str
    seed: int
    options: Options
    config: RunConfig
    evaluations: Mapping[str, Options]

    @property
    def name(self) -> str:
        """Name in messages: `iRPE k, 400, seed 0`."""
        return ", ".join(part for part in (self.variant, self.point, f"seed {self.seed}") if part)

    @property
    def folder(self) -> str:
        """Output folder of the training, relative to that of the ablation."""
        parts = [folder_name(self.variant), folder_name(self.point), f"seed_{self.seed}"]
        return "/".join(part for part in parts if part)

    def evaluated(self, label: str) -> RunConfig:
        """Return all options of the evaluation at a point."""
        return make_config(type(self.config), {**self.options, **self.evaluations[label]})

    def is_trained_at(self, label: str) -> bool:
        """Return whether the evaluation at a point is the one of the training."""
        return dump(self.evaluated(label)) == dump(self.config)


@dataclass(frozen=True)
class Ablation:
    """A checked file with its cells.

    Attributes:
        path: Path of the file.
        file: Its content.
        cells: All cells, seed by seed, so that an interrupted ablation has all variants.
        reference: Label of the variant that the others are compared with.
    """

    path: Path
    file: AblationFile
    cells: tuple[Cell, ...]
    reference: str

    @property
    def name(self) -> str:
        """Name of the file without its ending."""
        return self.path.stem


def load_ablation(path: str, reference: str = "") -> Ablation:
    """Read the file of an ablation and check all of its configurations.

    Args:
        path: YAML file.
        reference: Label of the variant that the others are compared with; empty is the first.

    Raises:
        UsageError: The file is invalid, the trainer refuses the options of a cell, or no variant
            has the label of the reference.
    """
    file = read_file(path)
    reference = reference or next(iter(file.variants))
    if reference not in file.variants:
        raise UsageError(
            f"--reference must be one of {', '.join(file.variants)}, got {reference!r}"
        )
    cls = TRAINERS[file.trainer]
    base: Options = {}
    if file.config:
        read = read_config(cls, file.config)
        base = {name: value for name, value in dump(read).items() if name in read.model_fields_set}
        base = {name: value for name, value in base.items() if name not in _RESERVED}
    training = (file.train_at or {"points": {"": {}}})["points"]
    evaluations = (file.evaluate_at or {"points": {}})["points"]
    _check_names(path, "options", file.options, cls)
    for kind, labeled in (
        ("variant", file.variants),
        ("point", training),
        ("point", evaluations),
    ):
        for label, options in labeled.items():
            _check_names(path, f"{kind} {label!r}", options, cls)
    cells = [
        _cell(path, file, base, (variant, point, seed), evaluations)
        for seed in file.seeds
        for point in training
        for variant in file.variants
    ]
    _check_different(path, [cell for cell in cells if cell.seed == file.seeds[0]])
    return Ablation(Path(path), file, tuple(cells), reference)


def _check_names(path: str, place: str, options: Options, cls: type[RunConfig]) -> None:
    """Refuse unknown options, and those that the ablation sets itself."""
    for name in options:
        if name not in cls.model_fields:
            raise UsageError(
                f"{path}: {place}: {name} is not an option of the trainer"
                f"{suggest(name, cls.model_fields)}"
            )
        if name in _RESERVED:
            raise UsageError(f"{path}: {place}: {name} must not be set: the ablation sets it")


def _cell(
    path: str,
    file: AblationFile,
    base: Options,
    labels: tuple[str, str, int],
    evaluations: Mapping[str, Options],
) -> Cell:
    """Return a cell with its validated options.

    Raises:
        UsageError: The trainer refuses the options, or its log does not have the metric.
    """
    variant, point, seed = labels
    own = file.variants[variant]
    at_point = file.train_at["points"][point] if file.train_at else {}
    place = f"{path}: variant {variant!r}" + (f", point {point!r}" if point else "")
    if both := sorted(own.keys() & at_point.keys()):
        raise UsageError(f"{place}: {both[0]} must be set by the variant or by the point, not both")
    cls = TRAINERS[file.trainer]
    options = {**base, **file.options, **own, **at_point, "seed": seed}
    config = _validated(cls, options, place)
    for label, differences in evaluations.items():
        _validated(cls, {**options, **differences}, f"{place}, point {label!r}")
    _check_metric(file, config, place)
    return Cell(variant, point, seed, options, config, evaluations)


def _validated(cls: type[RunConfig], options: Options, place: str) -> RunConfig:
    """Return the configuration of the trainer; its errors name the place in the file."""
    try:
        return make_config(cls, dict(options))
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error


def _check_metric(file: AblationFile, config: RunConfig, place: str) -> None:
    """Refuse a metric that the log, or with `evaluate_at` an evaluation, does not have."""
    names = [
        name for name in metrics_of(config) if name.startswith("test_") or not file.evaluate_at
    ]
    if file.metric not in names:
        raise UsageError(f"{place}: metric must be one of {', '.join(names)}, got {file.metric!r}")


def _check_different(path: str, cells: Sequence[Cell]) -> None:
    """Refuse variants and points that give the same configuration twice."""
    found: dict[str, Cell] = {}
    for cell in cells:
        other = found.setdefault(str(sorted(dump(cell.config).items())), cell)
        if other is not cell:
            names = [", ".join(filter(None, (c.variant, c.point))) for c in (other, cell)]
            raise UsageError(
                f"{path}: {names[0]!r} and {names[1]!r} must differ: they give the same options"
            )
        points: dict[str, str] = {}
        for label in cell.evaluations:
            first = points.setdefault(str(sorted(dump(cell.evaluated(label)).items())), label)
            if first != label:
                raise UsageError(
                    f"{path}: points {first!r} and {label!r} must differ: they give the same "
                    "options"
                )


def check_models(path: str, cells: Sequence[Cell]) -> None:
    """Build each different model of the cells once, for training and for its evaluations.

    Raises:
        UsageError: A model cannot be built.
    """
    built = set()
    for place, config in _configurations(cells):
        key = model_options(config)
        if key in built:
            continue
        built.add(key)
        try:
            build(config)
        except (UsageError, ValueError) as error:
            raise UsageError(f"{path}: {place}: {error}") from error


def _configurations(cells: Sequence[Cell]) -> Iterator[tuple[str, RunConfig]]:
    """Yield the options of each training and evaluation, with their place in the file."""
    for cell in cells:
        place = ", point ".join(filter(None, (f"variant {cell.variant!r}", cell.point)))
        yield place, cell.config
        for label in cell.evaluations:
            yield f"{place}, point {label!r}", cell.evaluated(label)


def check_recorded(cells: Sequence[Cell], output_dir: Path) -> None:
    """Check that cells that ran before, wholly or in part, ran with the same options.

    A cell without a checkpoint can have new options: nothing of it would be mixed.

    Raises:
        UsageError: The options of a cell differ.
    """
    for cell in cells:
        folder = output_dir / cell.folder
        if not any((folder / name).exists() for name in ("checkpoint.pth", "result.json")):
            continue
        try:
            recorded = yaml.safe_load((folder / "options.yaml").read_text(encoding="utf-8"))
            config = dump(make_config(type(cell.config), recorded))
        except (OSError, ValueError, TypeError, yaml.YAMLError, UsageError) as error:
            raise UsageError(
                f"cell {cell.name!r}: {folder} has a checkpoint but no valid options.yaml: remove "
                "the folder, or give another --output_dir"
            ) from error
        for name, value in dump(cell.config).items():
            if config[name] != value:
                raise UsageError(
                    f"cell {cell.name!r} ran with {name} {config[name]!r} in {folder}, but the "
                    f"file now has {value!r}: remove the folder, or give another --output_dir"
                )
