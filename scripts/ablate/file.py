"""The YAML file of an ablation: a base configuration, variants, seeds and a metric.

Labels of variants and points keep the order of the file. Values of options are checked by the
trainer's own configuration, in `scripts.ablate.cells`.
"""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from engine import Config, UsageError
from engine.config import read_config

__all__ = ["AblationFile", "folder_name", "read_file"]

Options = dict[str, Any]


def folder_name(label: str) -> str:
    """Return a label as the name of a folder: `iRPE k` gives `iRPE_k`."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", label).strip("._-")


class AblationFile(Config):
    """Ablation."""

    trainer: Literal["classification", "detection"]
    """Trainer of all cells."""
    config: str = ""
    """Path of the base configuration of the trainer; empty uses the defaults of the trainer."""
    metric: str = Field(min_length=1)
    """Metric of the last line of log.txt, such as test_acc1."""
    seeds: tuple[int, ...]
    """Random seeds; each variant is trained once with each."""
    options: Options = Field(default_factory=dict)
    """Differences of all cells to the base configuration."""
    variants: dict[str, Options]
    """Differences of each variant, by its label."""
    train_at: dict[str, Any] | None = None
    """Label of an axis, and points at which each variant is trained."""
    evaluate_at: dict[str, Any] | None = None
    """Label of an axis, and points at which each trained model is evaluated."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _check_seeds(cls, seeds: Any) -> Any:
        """Refuse anything but different integers."""
        is_list = isinstance(seeds, (list, tuple)) and len(seeds) > 0
        if not is_list or not all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds):
            raise ValueError("must be a list of integers from 0 on, such as [0, 1, 2, 3, 4]")
        if len(set(seeds)) < len(seeds):
            raise ValueError("must be different seeds")
        return seeds

    @field_validator("options", mode="before")
    @classmethod
    def _check_options(cls, options: Any) -> Options:
        """Return the options, also for a key without a value."""
        return _options(options)

    @field_validator("variants", mode="before")
    @classmethod
    def _check_variants(cls, variants: Any) -> dict[str, Options]:
        """Return the variants by label."""
        labeled = _labeled(variants, "variants")
        if len(labeled) < 2:
            raise ValueError("must have at least two variants")
        return labeled

    @field_validator("train_at", "evaluate_at", mode="before")
    @classmethod
    def _check_points(cls, axis: Any) -> dict[str, Any] | None:
        """Return an axis with its points by label."""
        if axis is None:
            return None
        known = isinstance(axis, dict) and set(axis) == {"label", "points"}
        if not known or not isinstance(axis["label"], str):
            raise ValueError("must have two keys, label (text) and points (label: options)")
        points = _labeled(axis["points"], "points")
        if not points:
            raise ValueError("must have at least one point")
        return {"label": axis["label"], "points": points}

    @model_validator(mode="after")
    def _check_axes(self) -> "AblationFile":
        """Refuse two axes: a curve has one."""
        if self.train_at and self.evaluate_at:
            raise ValueError(
                "train_at and evaluate_at exclude each other: write a file for each curve"
            )
        return self

    @property
    def axis(self) -> str:
        """Label of the axis of the points; empty without points."""
        return (self.train_at or self.evaluate_at or {"label": ""})["label"]

    @property
    def points(self) -> list[str]:
        """Labels of the points of either axis; one empty label without points."""
        return list((self.train_at or self.evaluate_at or {"points": {"": {}}})["points"])


def read_file(path: str) -> AblationFile:
    """Read the file of an ablation.

    Raises:
        UsageError: The file cannot be read, a key is unknown or a value is wrong.
    """
    try:
        return read_config(AblationFile, path)
    except UsageError as error:
        text = str(error)
        # Errors about a key name its place; those about the combination of keys do not.
        raise UsageError(text if text.startswith(path) else f"{path}: {text}") from error


def _options(options: Any) -> Options:
    """Return options; none for a key without a value."""
    if options is None:
        return {}
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError("must have `option: value` pairs of the trainer")
    return {name.replace("-", "_"): value for name, value in options.items()}


def _labeled(mapping: Any, name: str) -> dict[str, Options]:
    """Return a mapping of labels to options, with labels as text that can name a folder."""
    if not isinstance(mapping, dict):
        raise ValueError(f"must have `label: {{option: value}}` pairs ({name})")
    labeled: dict[str, Options] = {}
    folders: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(key, bool) or not isinstance(key, (str, int, float)):
            raise ValueError(f"must have labels of text (put {key!r} in quotes)")
        label = str(key)
        folder = folder_name(label)
        if not folder:
            raise ValueError(f"must have labels with a letter or digit, got {label!r}")
        other = folders.setdefault(folder.lower(), label)
        if other != label or label in labeled:
            raise ValueError(
                f"must have labels with different letters and digits, got {other!r} and {label!r}"
            )
        try:
            labeled[label] = _options(value)
        except ValueError as error:
            raise ValueError(f"{error} for {label!r}") from error
    return labeled
