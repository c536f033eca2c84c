"""Markdown tables of the zoo: published metrics, and parameters and MACs of the models."""

import math
import os
import re
from collections.abc import Sequence

from scripts.zoo.checkpoints import cached
from scripts.zoo.macs import DETECTION_SIZE, Cost
from scripts.zoo.rows import TASKS, Row, Zoo

__all__ = [
    "cost_table",
    "differing_costs",
    "fill_in",
    "markdown",
    "overview",
    "published_table",
    "urls",
]

_MARKED = re.compile(
    r"(?P<head><!-- zoo: (?P<task>\w+)\b[^>]*-->\n).*?(?P<tail><!-- end of zoo -->)", re.DOTALL
)
_WIDEST = 80  # characters of a padded cell
_NOTE = """\
MACs: for one image, by the published convention, in millions, rounded up.
MACs run: MACs of this implementation, where iRPE on the values costs K·d per query and head
instead of L·d.
For detectors: matrix products and convolutions only, for an image of {} x {}.
"""


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns, which is readable on a terminal too.

    Columns of long cells, such as URLs, are not padded.
    """
    longest = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    widths = [
        width if width <= _WIDEST else len(heading)
        for heading, width in zip(header, longest, strict=True)
    ]
    cells = [header, ["-" * width for width in widths], *lines]
    return "".join(
        f"| {' | '.join(c.ljust(width) for c, width in zip(line, widths, strict=True))} |\n"
        for line in cells
    )


def published_table(rows: Sequence[Row]) -> str:
    """Return the table of the published values and files of rows of one task."""
    task = TASKS[rows[0].task]
    columns = task.costs | task.metrics
    with_logs = any(row.logs for row in rows)
    lines = []
    for row in rows:
        values = [column.show(row.published.get(name)) for name, column in columns.items()]
        lines.append(
            [*_identity(row).values(), *values, *_links(row, with_logs=with_logs).values()]
        )
    headings = [column.heading for column in columns.values()]
    links = _links(rows[0], with_logs=with_logs)
    return markdown([*_identity(rows[0]), *headings, *links], lines)


def overview(rows: Sequence[Row]) -> str:
    """Return the table of rows of one task with configurations and cached checkpoints."""
    columns = TASKS[rows[0].task].costs | TASKS[rows[0].task].metrics
    lines = []
    for row in rows:
        state = "not published" if row.checkpoint is None else "in the cache"
        if row.checkpoint is not None and cached(row) is None:
            state = "not in the cache"
        values = [column.show(row.published.get(name)) for name, column in columns.items()]
        lines.append([row.name, *values, os.path.relpath(row.config_file), state])
    headings = [column.heading for column in columns.values()]
    return markdown(["row", *headings, "configuration", "checkpoint"], lines)


def urls(rows: Sequence[Row]) -> str:
    """Return the names of rows, each followed by the URLs of its checkpoint and its logs."""
    lines = []
    for row in rows:
        found = [row.checkpoint, *(row.logs or ())] if row.checkpoint else ["not published"]
        lines += [f"{row.name}:", *(f"  {url}" for url in found)]
    return "".join(f"{line}\n" for line in lines)


def cost_table(rows: Sequence[Row], costs: Sequence[Cost]) -> str:
    """Return the table of counted and published parameters and MACs."""
    lines = []
    for row, cost in zip(rows, costs, strict=True):
        cells = [row.name]
        for name, column in TASKS["classification"].costs.items():
            cells += [column.show(_in_millions(cost)[name]), column.show(row.published.get(name))]
        lines.append([*cells, str(_rounded_up(cost.macs_run))])
    header = ["row", "#Params (M)", "published", "MACs (M)", "published", "MACs run (M)"]
    return markdown(header, lines) + "\n" + _NOTE.format(*DETECTION_SIZE)


def differing_costs(rows: Sequence[Row], costs: Sequence[Cost]) -> list[str]:
    """Return a message for each count that differs from the published one."""
    differing = []
    for row, cost in zip(rows, costs, strict=True):
        for name, column in TASKS[row.task].costs.items():
            counted = column.show(_in_millions(cost)[name])
            published = column.show(row.published.get(name))
            if name in row.published and counted != published:
                differing.append(
                    f"{row.name}: {column.heading} must be {published} as published, got {counted}"
                )
    return differing


def fill_in(text: str, zoo: Zoo) -> tuple[str, set[str]]:
    """Fill the tables of published models into a document.

    A table is between the lines `<!-- zoo: TASK … -->` and `<!-- end of zoo -->`.

    Args:
        text: The document.
        zoo: Zoo of the rows.

    Returns:
        The filled document, and the tasks that have a table in it.
    """
    tables = {
        task: published_table(rows)
        for task in TASKS
        if (rows := [row for row in zoo.rows if row.task == task])
    }
    found = {match["task"] for match in _MARKED.finditer(text)} & tables.keys()

    def fill(match: re.Match) -> str:
        table = tables.get(match["task"])
        return match[0] if table is None else match["head"] + table + match["tail"]

    return _MARKED.sub(fill, text), found


def _identity(row: Row) -> dict[str, str]:
    """Return the columns that identify a row, by heading."""
    if row.task == "classification":
        return {"model": row.name, "iRPE on": " ".join(row.rpe.rpe_on) if row.rpe else "—"}
    config = row.config
    return {
        "iRPE (--enc_rpe2d)": config.enc_rpe2d,
        "buckets": _buckets(row),
        "epochs": str(config.epochs),
    }


def _links(row: Row, *, with_logs: bool) -> dict[str, str]:
    """Return the columns with the links to a row's files, by heading."""
    links = {"Link": f"[link]({row.checkpoint})" if row.checkpoint else "—"}
    if with_logs:
        links["Log"] = f"[log]({row.logs.log}) [detail]({row.logs.detail})" if row.logs else "—"
    return links


def _buckets(row: Row) -> str:
    """Return the number of buckets, as a product for the product method."""
    if row.rpe is None:
        return "—"
    side = math.isqrt(row.rpe.num_buckets)
    return f"{side} × {side}" if row.rpe.method == "product" else str(row.rpe.num_buckets)


def _in_millions(cost: Cost) -> dict[str, float | None]:
    """Return parameters and MACs under the names and in the units of zoo.yaml."""
    macs = None if cost.macs is None else _rounded_up(cost.macs)
    return {"params": cost.params / 1e6, "macs": macs}


def _rounded_up(count: int) -> int:
    """Round up to whole millions."""
    return -(-count // 1_000_000)
