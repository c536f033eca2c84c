"""What an evaluation of the zoo found: kept from run to run, and written in Markdown, JSON and CSV.

`zoo.json` holds all of it and is what a later run goes on from; the other two are for reading. They
are written anew after every row, each whole or not at all.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from engine import UserError, replacing
from scripts.zoo.rows import TASKS, Row, Zoo
from scripts.zoo.tables import markdown

__all__ = ["Comparison", "Record", "Report", "compare", "verdict"]


@dataclass(frozen=True)
class Record:
    """The outcome of one row.

    Attributes:
        reason: Why there are no figures; empty where there are.
        measured: Figures by their names in zoo.yaml.
        images: How many were evaluated.
        images_per_s: Over all processes, with loading.
        checkpoint: Its address; `sha256` is of the file that was read.
        settings: What, with the checkpoint, decides about the figures and their speed.
        machine: Where the figures come from.
        failed_later: Why a later evaluation of the same checkpoint gave no figures.
    """

    reason: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    images: int | None = None
    images_per_s: float | None = None
    checkpoint: str = ""
    sha256: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    failed_later: str = ""


class Comparison(NamedTuple):
    """A measured figure beside the published one; None for what is not known."""

    measured: float
    published: float | None
    difference: float | None
    tolerance: float
    within: bool | None


def compare(row: Row, record: Record) -> dict[str, Comparison]:
    """A row's measured figures beside the published ones, by their names in zoo.yaml."""
    tolerance = TASKS[row.task].tolerance
    comparisons = {}
    for name, measured in record.measured.items():
        published = row.published.get(name)
        difference = within = None
        if published is not None:
            # Published figures are decimal: 82.4 - 82.3 must not be more than 0.1.
            difference = round(measured - published, 9)
            within = abs(difference) <= tolerance
        comparisons[name] = Comparison(measured, published, difference, tolerance, within)
    return comparisons


def verdict(row: Row, record: Record) -> str:
    """`within` or `outside` the tolerance, `not compared` or `not run`."""
    if record.reason:
        return "not run"
    results = {c.within for c in compare(row, record).values()} - {None}
    if not results:
        return "not compared"
    return "within" if results == {True} else "outside"


class Report:
    """The records of a zoo's rows in a folder.

    Args:
        folder: An existing one; the records that it holds are read.
        zoo: Whose rows are reported.

    Raises:
        UserError: The folder has a `zoo.json` that is none of ours.
    """

    def __init__(self, folder: Path, zoo: Zoo) -> None:
        self.folder = folder
        self.zoo = zoo
        self.records = _read(folder / "zoo.json")

    def put(self, row: Row, record: Record) -> None:
        """Keep a row's record and write the three files.

        A failure stands beside the figures of an earlier evaluation of the same checkpoint, and
        takes the place of another's.

        Raises:
            UserError: They cannot be written.
        """
        known = self.records.get(row.name, record)
        if record.reason and not known.reason and known.checkpoint == record.checkpoint:
            record = replace(known, failed_later=record.reason)
        self.records[row.name] = record
        found = [(r, self.records[r.name]) for r in self.zoo.rows if r.name in self.records]
        _write(self.folder / "zoo.json", self._json(found))
        _write(self.folder / "zoo.csv", _csv(found))
        _write(self.folder / "zoo.md", _markdown(self.zoo, found))

    def _json(self, found: "_Found") -> str:
        # Rows of another zoo, which was evaluated into the same folder, stay as they are.
        rows = {name: asdict(record) for name, record in self.records.items()}
        for row, record in found:
            figures = {name: c._asdict() for name, c in compare(row, record).items()}
            rows[row.name] |= {
                "task": row.task,
                "verdict": verdict(row, record),
                "figures": figures,
            }
        return json.dumps({"published_in": self.zoo.source, "rows": rows}, indent=2) + "\n"


_Found = Sequence[tuple[Row, Record]]


def _read(path: Path) -> dict[str, Record]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        fields = Record.__dataclass_fields__
        return {
            name: Record(**{key: value for key, value in row.items() if key in fields})
            for name, row in rows.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as the report of an evaluation: remove it, or choose another "
            "--output"
        ) from error


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _csv(found: _Found) -> str:
    """A line for each figure; a row without figures has one line with its reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["row", "task", "figure", *Comparison._fields, "images", "images_per_s", "device"]
    writer.writerow([*header, "torch", "sha256", "reason"])
    for row, record in found:
        facts = [record.images, record.images_per_s, record.machine.get("device")]
        facts += [record.machine.get("torch"), record.sha256, record.reason or record.failed_later]
        nothing = {"": (None,) * len(Comparison._fields)}
        for name, comparison in (compare(row, record) or nothing).items():
            writer.writerow([row.name, row.task, name, *comparison, *facts])
    return text.getvalue()


def _markdown(zoo: Zoo, found: _Found) -> str:
    parts = [
        "# The zoo, evaluated\n\n"
        "A figure is followed by the published one and the difference, in parentheses. Published "
        f"figures: {zoo.source}.\n"
    ]
    for task in TASKS:
        ran = [(row, rec) for row, rec in found if row.task == task and not rec.reason]
        if ran:
            parts.append(f"## {task}\n\n{_figures(task, ran)}")
    missing = [f"- {row.name}: {why}\n" for row, record in found if (why := _why(record))]
    if missing:
        parts.append("## Not run\n\n" + "".join(missing))
    machines: dict[str, list[str]] = {}
    for row, record in found:
        if not record.reason:
            facts = ", ".join(f"{name} {value}" for name, value in record.machine.items())
            machines.setdefault(facts, []).append(row.name)
    if machines:
        lines = [f"- {facts}: {', '.join(names)}\n" for facts, names in machines.items()]
        parts.append("## Measured on\n\n" + "".join(lines))
    return "\n".join(parts)


def _why(record: Record) -> str:
    """Why the last evaluation gave no figures; empty where it did."""
    if record.failed_later:
        return f"{record.failed_later}; its figures above are of an earlier evaluation"
    return record.reason


def _figures(task: str, ran: _Found) -> str:
    figures, tolerance = TASKS[task].figures, TASKS[task].tolerance
    headings = [figure.heading for figure in figures.values()]
    lines = []
    for row, record in ran:
        cells = [row.name]
        for name, c in compare(row, record).items():
            # A decimal more than published, so that a difference within the tolerance shows.
            decimals = figures[name].decimals + 1
            beside = ""
            if c.published is not None:
                beside = f" ({figures[name].show(c.published)}, {c.difference:+.{decimals}f})"
            cells.append(f"{c.measured:.{decimals}f}{beside}")
        answer = {"within": "yes", "outside": "no"}.get(verdict(row, record), "—")
        lines.append([*cells, answer, str(record.images), f"{record.images_per_s:.4g}"])
    header = ["row", *headings, f"within {tolerance}", "images", "images/s"]
    return markdown(header, lines)
