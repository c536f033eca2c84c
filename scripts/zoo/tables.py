"""The zoo's tables in Markdown: what is published, and what the models themselves cost."""

import math
import os
import re
from collections.abc import Sequence

from scripts.zoo.checkpoints import cached
from scripts.zoo.macs import DETECTION_SIZE, Cost
from scripts.zoo.rows import TASKS, Row, Zoo

__all__ = ["cost_table", "differing_costs", "fill_in", "markdown", "overview", "published_table"]

_PLACE = re.compile(
    r"(?P<head><!-- zoo: (?P<task>\w+)\b[^>]*-->\n).*?(?P<tail><!-- end of zoo -->)", re.DOTALL
)
_NOTE = """\
MACs: of one image, by the published convention, in millions rounded up. MACs run: as computed here,
where iRPE on the values costs K products a query in place of L; of a detector the products and
convolutions alone, on an image of {} x {}.
"""


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned, so that it reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    cells = [header, ["-" * width for width in widths], *lines]
    return "".join(
        f"| {' | '.join(c.ljust(width) for c, width in zip(line, widths, strict=True))} |\n"
        for line in cells
    )


def published_table(rows: Sequence[Row]) -> str:
    """The published figures of rows of one task."""
    task = TASKS[rows[0].task]
    columns = task.costs | task.figures
    lines = [
        [*_identity(row).values(), *(f.show(row.published.get(n)) for n, f in columns.items())]
        for row in rows
    ]
    return markdown([*_identity(rows[0]), *(f.heading for f in columns.values())], lines)


def overview(rows: Sequence[Row]) -> str:
    """Rows of one task: figures, configurations, and whether their checkpoints are here."""
    columns = TASKS[rows[0].task].costs | TASKS[rows[0].task].figures
    lines = []
    for row in rows:
        here = "not published" if row.checkpoint is None else "in the cache"
        if row.checkpoint is not None and cached(row) is None:
            here = "not in the cache"
        figures = [figure.show(row.published.get(name)) for name, figure in columns.items()]
        lines.append([row.name, *figures, os.path.relpath(row.config_file), here])
    headings = [figure.heading for figure in columns.values()]
    return markdown(["row", *headings, "configuration", "checkpoint"], lines)


def cost_table(rows: Sequence[Row], costs: Sequence[Cost]) -> str:
    """Parameters and MACs beside the published ones, and the MACs that are computed here."""
    lines = []
    for row, cost in zip(rows, costs, strict=True):
        cells = [row.name]
        for name, figure in TASKS["classification"].costs.items():
            cells += [figure.show(_in_millions(cost)[name]), figure.show(row.published.get(name))]
        lines.append([*cells, str(_rounded_up(cost.macs_run))])
    header = ["row", "#Params (M)", "published", "MACs (M)", "published", "MACs run (M)"]
    return markdown(header, lines) + "\n" + _NOTE.format(*DETECTION_SIZE)


def differing_costs(rows: Sequence[Row], costs: Sequence[Cost]) -> list[str]:
    """Where a model is not what was published, in words."""
    differing = []
    for row, cost in zip(rows, costs, strict=True):
        for name, figure in TASKS[row.task].costs.items():
            ours, theirs = figure.show(_in_millions(cost)[name]), row.published.get(name)
            if theirs is not None and ours != figure.show(theirs):
                differing.append(
                    f"{row.name} has {figure.heading} {ours} in place of {figure.show(theirs)}"
                )
    return differing


def fill_in(text: str, zoo: Zoo) -> tuple[str, set[str]]:
    """A document with the published tables in their places, and the tasks that have a place.

    A place begins with the line `<!-- zoo: TASK … -->` and ends with `<!-- end of zoo -->`.
    """
    tables = {
        task: published_table(rows)
        for task in TASKS
        if (rows := [row for row in zoo.rows if row.task == task])
    }
    found = {place["task"] for place in _PLACE.finditer(text)} & tables.keys()

    def fill(place: re.Match) -> str:
        return place["head"] + tables[place["task"]] + place["tail"]

    return _PLACE.sub(lambda p: fill(p) if p["task"] in found else p[0], text), found


def _identity(row: Row) -> dict[str, str]:
    """What a row is, by heading."""
    if row.task == "classification":
        return {"model": row.name, "iRPE on": " ".join(row.rpe.rpe_on) if row.rpe else "—"}
    config = row.config
    return {"enc_rpe2d": config.enc_rpe2d, "buckets": _buckets(row), "epochs": str(config.epochs)}


def _buckets(row: Row) -> str:
    if row.rpe is None:
        return "—"
    side = math.isqrt(row.rpe.num_buckets)
    return f"{side} × {side}" if row.rpe.method == "product" else str(row.rpe.num_buckets)


def _in_millions(cost: Cost) -> dict[str, float | None]:
    """By the names of zoo.yaml, in its units."""
    macs = None if cost.macs is None else _rounded_up(cost.macs)
    return {"params": cost.params / 1e6, "macs": macs}


def _rounded_up(count: int) -> int:
    return -(-count // 1_000_000)
