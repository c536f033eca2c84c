"""The results of the cells of an ablation, and the statistics of its variants."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import UserError
from scripts.ablate.cells import Ablation, Cell
from scripts.ablate.results import metric_at, read_result
from scripts.ablate.statistics import Difference, Summary, difference, summary
from scripts.ablate.trainers import lower_is_better, without_weights

__all__ = ["Collected", "collect", "cost_of_variant"]


@dataclass(frozen=True)
class Collected:
    """Results of the cells of an ablation that have any.

    Attributes:
        ablation: The ablation.
        results: Result of each cell by its name.
        rows: Cells with their points and metrics; None for a missing metric.
    """

    ablation: Ablation
    results: Mapping[str, dict[str, Any]]
    rows: tuple[tuple[Cell, str, float | None], ...]

    def values(self, variant: str, point: str) -> dict[int, float]:
        """Return the metric of a variant at a point by seed."""
        found = {}
        for cell, label, value in self.rows:
            if (cell.variant, label) == (variant, point) and value is not None:
                found[cell.seed] = value
        return found

    @property
    def missing(self) -> list[str]:
        """Names of the cells, and of their points, without a metric."""
        return [
            cell.name + (f" at {label}" if cell.evaluations else "")
            for cell, label, value in self.rows
            if value is None
        ]

    @property
    def job_counts(self) -> list[int]:
        """Different numbers of cells that ran at once."""
        return sorted({result["jobs"] for result in self.results.values()})

    def summary(self, variant: str, point: str) -> Summary | None:
        """Return the mean of a variant at a point."""
        return summary(self.values(variant, point))

    def difference(self, variant: str, point: str) -> Difference | None:
        """Return the difference of a variant to the reference at a point; None for itself."""
        reference = self.ablation.reference
        if variant == reference:
            return None
        return difference(
            self.values(variant, point),
            self.values(reference, point),
            lower_is_better=lower_is_better(self.ablation.file.metric),
        )

    def of(self, variant: str) -> list[tuple[Cell, dict[str, Any]]]:
        """Return the cells of a variant that have results."""
        return [
            (cell, self.results[cell.name])
            for cell in self.ablation.cells
            if cell.variant == variant and cell.name in self.results
        ]


def collect(ablation: Ablation, output_dir: Path) -> Collected:
    """Read the results of all cells.

    Raises:
        UserError: No cell has a result.
    """
    results = {cell.name: read_result(cell, output_dir) for cell in ablation.cells}
    found = {name: result for name, result in results.items() if result is not None}
    if not found:
        raise UserError(f"{output_dir} has no finished cell of {ablation.path}")
    metric = ablation.file.metric
    rows = []
    for cell in ablation.cells:
        result = found.get(cell.name)
        for label in cell.evaluations or [cell.point]:
            metrics = metric_at(cell, result, label) if result else None
            rows.append((cell, label, (metrics or {}).get(metric)))
    return Collected(ablation, found, tuple(rows))


def cost_of_variant(collected: Collected, variant: str) -> dict[str, float | None]:
    """Return parameters, MACs and time per step of a variant, as far as they are known."""
    found = collected.of(variant)
    if not found:
        return {"parameters": None, "macs": None, "step_s": None}
    cell, result = found[0]
    steps = [result["step_s"] for _, result in found if result["step_s"]]
    return {
        "parameters": result["metrics"]["n_parameters"],
        "macs": _macs(cell, result["classes"]),
        "step_s": min(steps, default=None),
    }


def _macs(cell: Cell, num_classes: int | None) -> int | None:
    """Return the MACs of the model of a cell; None, with a line, if they cannot be counted."""
    from scripts.zoo.macs import cost_of_model

    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return cost_of_model(without_weights(cell.config), **classes).macs_run
    except (UserError, ValueError, RuntimeError) as error:
        # The results of hours must not depend on the count of some operator.
        print(f"the MACs of {cell.variant} are not counted: {error}", flush=True)
        return None
