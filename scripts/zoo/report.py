"""Report of an evaluation of the zoo, as Markdown, JSON and CSV.

`zoo.json` holds all records, and a later evaluation continues from it. `zoo.md` and `zoo.csv` are
for reading. After every row each file is replaced atomically.
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
    """Outcome of the evaluation of one row.

    Attributes:
        reason: Reason of a failure; empty if there are metrics.
        measured: Metrics by their names in zoo.yaml.
        images: Number of evaluated images.
        images_per_s: Images per second over all processes, including data loading.
        checkpoint: URL of the checkpoint.
        sha256: SHA-256 of the checkpoint file.
        settings: Settings that, with the checkpoint, determine metrics and speed.
        machine: Device, versions and git revision of the evaluation.
        failed_later: Reason why a later evaluation of the same checkpoint failed.
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
    """A measured metric and the published one; None for what is not known."""

    measured: float
    published: float | None
    difference: float | None
    tolerance: float
    within: bool | None


def compare(row: Row, record: Record) -> dict[str, Comparison]:
    """Compare the metrics of a record with the published ones, by their names in zoo.yaml."""
    tolerance = TASKS[row.task].tolerance
    comparisons = {}
    for name, measured in record.measured.items():
        published = row.published.get(name)
        difference = within = None
        if published is not None:
            # Rounded, so that 82.4 - 82.3 is not greater than 0.1 in binary floating point.
            difference = round(measured - published, 9)
            within = abs(difference) <= tolerance
        comparisons[name] = Comparison(measured, published, difference, tolerance, within)
    return comparisons


def verdict(row: Row, record: Record) -> str:
    """Return `within` or `outside` (the tolerance), `not compared` or `not run`."""
    if record.reason:
        return "not run"
    results = {c.within for c in compare(row, record).values()} - {None}
    if not results:
        return "not compared"
    return "within" if results == {True} else "outside"


class Report:
    """Records of the rows of a zoo, kept in a folder.

    Args:
        folder: An existing folder; its `zoo.json` is read if there is one.
        zoo: Zoo of the rows.

    Raises:
        UserError: The folder has a `zoo.json` of another program.
    """

    def __init__(self, folder: Path, zoo: Zoo) -> None:
        self.folder = folder
        self.zoo = zoo
        self.records = _read(folder / "zoo.json")

    def put(self, row: Row, record: Record) -> None:
        """Keep a row's record and write the three files.

        A failure is added to the metrics of an earlier evaluation of the same checkpoint, and
        replaces those of another checkpoint.

        Raises:
            UserError: A file cannot be written.
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
        """Return the content of `zoo.json`."""
        # Records of another zoo that was evaluated into the same folder are kept.
        rows = {name: asdict(record) for name, record in self.records.items()}
        for row, record in found:
            rows[row.name] |= {
                "task": row.task,
                "verdict": verdict(row, record),
                "metrics": {name: c._asdict() for name, c in compare(row, record).items()},
            }
        return json.dumps({"published_in": self.zoo.source, "rows": rows}, indent=2) + "\n"


_Found = Sequence[tuple[Row, Record]]


def _read(path: Path) -> dict[str, Record]:
    """Read the records of a `zoo.json`; keys that are not fields of a record are ignored."""
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
            f"cannot read {path} as the report of an evaluation: remove it, or choose another "
            "--output"
        ) from error


def _write(path: Path, text: str) -> None:
    """Replace a file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _csv(found: _Found) -> str:
    """Return a line for each metric; a row without metrics has one line with its reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["row", "task", "metric", *Comparison._fields, "images", "images_per_s", "device"]
    writer.writerow([*header, "torch", "sha256", "reason"])
    for row, record in found:
        facts = [record.images, record.images_per_s, record.machine.get("device")]
        facts += [record.machine.get("torch"), record.sha256, record.reason or record.failed_later]
        nothing = {"": (None,) * len(Comparison._fields)}
        for name, comparison in (compare(row, record) or nothing).items():
            writer.writerow([row.name, row.task, name, *comparison, *facts])
    return text.getvalue()


def _markdown(zoo: Zoo, found: _Found) -> str:
    """Return the content of `zoo.md`."""
    parts = [
        "# Evaluation of the model zoo\n\n"
        "Each metric is followed by the published one and the difference, in parentheses. "
        f"Published metrics: {zoo.source}.\n"
    ]
    for task in TASKS:
        ran = [(row, rec) for row, rec in found if row.task == task and not rec.reason]
        if ran:
            parts.append(f"## {task}\n\n{_metrics(task, ran)}")
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
        parts.append("## Machines\n\n" + "".join(lines))
    return "\n".join(parts)


def _why(record: Record) -> str:
    """Return the reason why the last evaluation failed; empty if it did not fail."""
    if record.failed_later:
        return f"{record.failed_later}; the metrics above are from an earlier evaluation"
    return record.reason


def _metrics(task: str, ran: _Found) -> str:
    """Return the Markdown table of the evaluated rows of one task."""
    columns, tolerance = TASKS[task].metrics, TASKS[task].tolerance
    headings = [column.heading for column in columns.values()]
    lines = []
    for row, record in ran:
        cells = [row.name]
        for name, c in compare(row, record).items():
            # One decimal more than published, to show differences below the tolerance.
            decimals = columns[name].decimals + 1
            comparison = ""
            if c.published is not None:
                comparison = f" ({columns[name].show(c.published)}, {c.difference:+.{decimals}f})"
            cells.append(f"{c.measured:.{decimals}f}{comparison}")
        answer = {"within": "yes", "outside": "no"}.get(verdict(row, record), "—")
        lines.append([*cells, answer, str(record.images), f"{record.images_per_s:.4g}"])
    header = ["row", *headings, f"within {tolerance}", "images", "images/s"]
    return markdown(header, lines)
