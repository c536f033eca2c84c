"""The report of an ablation: `table.md`, `cells.csv`, `results.json` and `plot.png`."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engine import UserError, provenance, replacing
from engine.optional import is_installed
from scripts.ablate.cells import Ablation, Cell
from scripts.ablate.plot import draw
from scripts.ablate.results import metric_at, read_result, write_json
from scripts.ablate.statistics import Difference, Summary, difference, summary
from scripts.ablate.trainers import lower_is_better, without_weights
from scripts.zoo.tables import markdown

__all__ = ["Collected", "collect", "write_report"]

_CAPTION = """\
{metric}: mean ± sample standard deviation over the seeds {seeds}
(n = {count}, unless another n is given).
Difference: mean difference to *{reference}*, paired by seed, with the 95 % interval of the paired t
test. "not shown": the interval contains zero, or there is none. Intervals are per comparison, not
corrected for the number of comparisons.{better}
"""
_COSTS = """\
Parameters that are trained; MACs of one image, counted. Time per training step: relative to
*{reference}*, from the logs of the trainings, with the loading of data; {jobs}.
"""


@dataclass(frozen=True)
class Collected:
    """Results of the cells of an ablation that have any.

    Attributes:
        ablation: The ablation.
        results: Result of each cell by its name.
        missing: Names of the cells, and of their points, without a metric.
    """

    ablation: Ablation
    results: Mapping[str, dict[str, Any]]
    missing: tuple[str, ...]

    def values(self, variant: str, point: str) -> dict[int, float]:
        """Return the metric of a variant at a point by seed."""
        found = {}
        for cell, label, value in self.rows():
            if (cell.variant, label) == (variant, point) and value is not None:
                found[cell.seed] = value
        return found

    def rows(self) -> list[tuple[Cell, str, float | None]]:
        """Return the cells with their points and metrics; None for a missing metric."""
        rows = []
        for cell in self.ablation.cells:
            result = self.results.get(cell.name)
            for label in cell.evaluations or [cell.point]:
                metrics = metric_at(cell, result, label) if result else None
                rows.append((cell, label, (metrics or {}).get(self.ablation.file.metric)))
        return rows

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
    rows = Collected(ablation, found, ()).rows()
    missing = [
        cell.name + (f" at {label}" if cell.evaluations else "")
        for cell, label, value in rows
        if value is None
    ]
    return Collected(ablation, found, tuple(missing))


def write_report(ablation: Ablation, output_dir: Path, command: str) -> str:
    """Write the four files of the report and return the Markdown.

    Args:
        ablation: The ablation.
        output_dir: Its folder.
        command: Command line that runs the ablation, without the number of jobs.

    Raises:
        UserError: No cell has a result, or a file cannot be written.
    """
    collected = collect(ablation, output_dir)
    counts = _job_counts(collected)
    command += f" --jobs {counts[0]}" if len(counts) == 1 and counts[0] > 1 else ""
    costs = {variant: _cost(collected, variant) for variant in ablation.file.variants}
    text = _markdown(collected, costs, command)
    _write(output_dir / "table.md", text)
    _write(output_dir / "cells.csv", _csv(collected))
    write_json(output_dir / "results.json", _json(collected, costs, command))
    if is_installed("matplotlib"):
        with replacing(output_dir / "plot.png") as temporary:
            draw(collected.ablation.file, collected.values, temporary)
    else:
        print("plot.png needs the package matplotlib: pip install matplotlib")
    return text


def _write(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _cost(collected: Collected, variant: str) -> dict[str, float | None]:
    """Return parameters, MACs and time per step of a variant, as far as they are known."""
    found = collected.of(variant)
    if not found:
        return {"parameters": None, "macs": None, "step_s": None}
    cell, result = found[0]
    steps = [result["step_s"] for _, result in found if result["step_s"]]
    return {
        "parameters": result["metrics"]["n_parameters"],
        "macs": _macs(cell, result["classes"]),
        "step_s": median(steps) if steps else None,
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


def _csv(collected: Collected) -> str:
    """Return one row for each cell and point that has a metric."""
    metric = collected.ablation.file.metric
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "point", "seed", metric, "seconds", "step_s", "n_parameters"])
    for cell, label, value in collected.rows():
        if value is not None:
            result = collected.results[cell.name]
            speed = (round(result["seconds"], 2), result["step_s"])
            parameters = result["metrics"]["n_parameters"]
            writer.writerow([cell.variant, label, cell.seed, value, *speed, parameters])
    return text.getvalue()


def _json(
    collected: Collected, costs: Mapping[str, Mapping[str, float | None]], command: str
) -> dict[str, Any]:
    """Return everything that is known about the ablation."""
    ablation = collected.ablation
    variants = {
        variant: {
            **costs[variant],
            "points": {
                point: {
                    "seeds": collected.values(variant, point),
                    "summary": _plain(collected.summary(variant, point)),
                    "difference": _plain(collected.difference(variant, point)),
                }
                for point in ablation.file.points
            },
        }
        for variant in ablation.file.variants
    }
    return {
        "name": ablation.name,
        "command": command,
        "metric": ablation.file.metric,
        "reference": ablation.reference,
        "axis": ablation.file.axis,
        "variants": variants,
        "missing": list(collected.missing),
        "file": ablation.file.model_dump(mode="json"),
        "cells": list(collected.results.values()),
        "report": provenance(),
    }


def _plain(value: Any) -> dict[str, Any] | None:
    """Return a dataclass as a dict."""
    return None if value is None else asdict(value)


def _markdown(
    collected: Collected, costs: Mapping[str, Mapping[str, float | None]], command: str
) -> str:
    """Return the report as Markdown."""
    ablation = collected.ablation
    file, metric = ablation.file, ablation.file.metric
    show = _decimals(collected)
    parts = [f"## {ablation.name}\n"]
    if file.axis:
        parts.append(f"{metric} by {file.axis}:\n")
        header = ["variant", *file.points]
        parts.append(markdown(header, _mean_rows(collected, show)))
        parts.append(f"Difference to *{ablation.reference}*:\n")
        parts.append(markdown(header, _difference_rows(collected, show)))
        parts.append(markdown(["variant", *_COST_NAMES], _cost_rows(collected, costs)))
    else:
        header = ["variant", metric, "difference", "95 % interval", "result", *_COST_NAMES]
        parts.append(markdown(header, _plain_rows(collected, costs, show)))
    better = " Lower is better." if lower_is_better(metric) else ""
    seeds = ", ".join(map(str, file.seeds))
    parts.append(
        _CAPTION.format(
            metric=metric,
            count=len(file.seeds),
            seeds=seeds,
            reference=ablation.reference,
            better=better,
        )
        + _COSTS.format(reference=ablation.reference, jobs=_jobs(collected))
    )
    parts.append(f"```bash\n{command}\n```\n")
    parts.append(_machines(collected))
    if collected.missing:
        count = len(collected.rows())
        names = "; ".join(collected.missing)
        parts.append(f"Missing: {len(collected.missing)} of {count} metrics ({names}).\n")
    return "\n".join(parts)


_COST_NAMES = ("parameters", "MACs", "time per step")


def _decimals(collected: Collected) -> int:
    """Return the number of decimals of a metric: 2 for percent, 4 for numbers around 1."""
    values = [abs(value) for _, _, value in collected.rows() if value is not None]
    return 2 if max(values) >= 10 else 4


def _mean(found: Summary | None, expected: int, decimals: int) -> str:
    """Return mean ± standard deviation, with n if seeds are missing."""
    if found is None:
        return "—"
    spread = "" if found.std is None else f" ± {found.std:.{decimals}f}"
    count = "" if found.n == expected else f" (n = {found.n})"
    return f"{found.mean:.{decimals}f}{spread}{count}"


def _interval(found: Difference | None, decimals: int) -> str:
    """Return the interval of a difference."""
    if found is None or found.interval is None:
        return "—"
    low, high = found.interval
    return f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"


def _plain_rows(
    collected: Collected, costs: Mapping[str, Mapping[str, float | None]], decimals: int
) -> list[list[str]]:
    """Return the rows of an ablation without points."""
    rows = []
    for variant, cost in zip(
        collected.ablation.file.variants, _cost_rows(collected, costs), strict=True
    ):
        found = collected.difference(variant, "")
        is_reference = variant == collected.ablation.reference
        shown = "—" if found is None else f"{found.mean:+.{decimals}f}"
        verdict = "reference" if is_reference else "—" if found is None else found.verdict
        mean = _mean(collected.summary(variant, ""), len(collected.ablation.file.seeds), decimals)
        rows.append([variant, mean, shown, _interval(found, decimals), verdict, *cost[1:]])
    return rows


def _mean_rows(collected: Collected, decimals: int) -> list[list[str]]:
    """Return the means of all variants at all points."""
    file = collected.ablation.file
    return [
        [variant]
        + [
            _mean(collected.summary(variant, point), len(file.seeds), decimals)
            for point in file.points
        ]
        for variant in file.variants
    ]


def _difference_rows(collected: Collected, decimals: int) -> list[list[str]]:
    """Return the differences of all variants but the reference at all points."""
    rows = []
    for variant in list(collected.ablation.file.variants)[1:]:
        row = [variant]
        for point in collected.ablation.file.points:
            found = collected.difference(variant, point)
            text = "—"
            if found is not None:
                interval = _interval(found, decimals)
                text = f"{found.mean:+.{decimals}f} {interval} {found.verdict}"
            row.append(text)
        rows.append(row)
    return rows


def _cost_rows(
    collected: Collected, costs: Mapping[str, Mapping[str, float | None]]
) -> list[list[str]]:
    """Return parameters, MACs and relative time per step of all variants."""
    rows = []
    base = costs[collected.ablation.reference]["step_s"]
    for variant, cost in costs.items():
        numbers = [cost["parameters"], cost["macs"]]
        step = cost["step_s"]
        time = f"{step / base:.2f}" if step and base else "—"
        rows.append([variant, *("—" if n is None else f"{n:,}" for n in numbers), time])
    return rows


def _job_counts(collected: Collected) -> list[int]:
    """Return the different numbers of cells that ran at once."""
    return sorted({result["jobs"] for result in collected.results.values()})


def _jobs(collected: Collected) -> str:
    """Return how many cells ran at once, in words."""
    counts = _job_counts(collected)
    if counts == [1]:
        return "one cell ran at a time"
    return f"{' or '.join(map(str, counts))} cells ran at once"


def _machines(collected: Collected) -> str:
    """Return the machines and versions that the cells ran with, and their time."""
    machines: dict[str, int] = {}
    for result in collected.results.values():
        facts = result["machine"]
        text = f"{facts['device']}, torch {facts['torch']}, timm {facts['timm']}"
        text += f", {facts['threads']} thread(s) per process" if facts["threads"] else ""
        machines[text] = machines.get(text, 0) + 1
    seconds = sum(result["seconds"] for result in collected.results.values())
    names = "; ".join(f"{text} ({count} cells)" for text, count in machines.items())
    return f"Machine: {names}. Sum of the times of all cells: {seconds / 60:.1f} minutes.\n"
