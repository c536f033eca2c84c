"""The report of an ablation: `table.md`, `cells.csv`, `results.json` and `plot.png`."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine import provenance, replacing
from engine.optional import is_installed
from scripts.ablate.cells import Ablation
from scripts.ablate.collected import Collected, collect, cost_of_variant
from scripts.ablate.plot import draw
from scripts.ablate.results import write_json
from scripts.ablate.tables import to_markdown

__all__ = ["write_report"]


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
    counts = collected.job_counts
    command += f" --jobs {counts[0]}" if len(counts) == 1 and counts[0] > 1 else ""
    costs = {variant: cost_of_variant(collected, variant) for variant in ablation.file.variants}
    text = to_markdown(collected, costs, command)
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


def _csv(collected: Collected) -> str:
    """Return one row for each cell and point that has a metric."""
    metric = collected.ablation.file.metric
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "point", "seed", metric, "seconds", "step_s", "n_parameters"])
    for cell, label, value in collected.rows:
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
        "missing": collected.missing,
        "file": ablation.file.model_dump(mode="json"),
        "cells": list(collected.results.values()),
        "report": provenance(),
    }


def _plain(value: Any) -> dict[str, Any] | None:
    """Return a dataclass as a dict."""
    return None if value is None else asdict(value)
