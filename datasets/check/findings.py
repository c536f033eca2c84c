"""The result of a check: findings in three levels, and a summary of each split."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

__all__ = ["LEVELS", "Finding", "Level", "Report", "Summary"]

Level = Literal["error", "warning", "note"]
# Each level with its meaning.
LEVELS: dict[Level, str] = {
    "error": "training would stop",
    "warning": "training would run, with worse results",
    "note": "worth knowing",
}


@dataclass(frozen=True)
class Finding:
    """One kind of problem in one split, or between the splits.

    Attributes:
        level: `error`, `warning` or `note`.
        kind: Plural name of what was found, such as `missing images`.
        split: `train`, `val` or `train and val`.
        count: Number of cases.
        meaning: Effect on the training, and the remedy, in one sentence.
        examples: Some of the cases.
    """

    level: Level
    kind: str
    split: str
    count: int
    meaning: str
    examples: Sequence[str] = ()

    @property
    def headline(self) -> str:
        """Kind and number of cases."""
        counted = self.count > 1 or self.examples
        return f"{self.kind} ({self.count:,})" if counted else self.kind


@dataclass(frozen=True)
class Summary:
    """The numbers of one split.

    Attributes:
        split: `train` or `val`.
        source: Folder or archive, with the annotation file if there is one.
        images: Number of images.
        counts: Number of objects, or of images for a classifier, by class name.
        areas: Areas of the M objects in square pixels, (M,) float32; None for a classifier.
        decoded: Number of images that were decoded without an error; None if none was read.
    """

    split: str
    source: str
    images: int
    counts: dict[str, int]
    areas: np.ndarray | None = None
    decoded: int | None = None


@dataclass
class Report:
    """All findings and summaries of a data set.

    Attributes:
        title: Name of the data set.
        summaries: One summary for each split that could be opened.
        findings: All findings.
    """

    title: str
    summaries: list[Summary] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if there is an error or a warning, else 0."""
        return int(any(finding.level != "note" for finding in self.findings))

    def of(self, level: Level) -> list[Finding]:
        """Return the findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    def result(self) -> str:
        """Return the numbers of errors and warnings in words."""
        words = [
            f"{len(self.of(level))} {level}{'' if len(self.of(level)) == 1 else 's'}"
            for level in LEVELS
        ]
        return ", ".join(words)
