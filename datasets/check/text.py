"""The report as plain text."""

import textwrap
from collections.abc import Iterator

from datasets.check.findings import LEVELS, Report, Summary
from datasets.check.sizes import coco_sizes

__all__ = ["format_text"]

_WIDTH = 100
_MAX_EXAMPLES = 5
_MAX_CLASSES = 30


def format_text(report: Report) -> str:
    """Return the report as plain text.

    Args:
        report: The report.
    """
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    """Yield the lines of the report."""
    yield f"Data set: {report.title}"
    for summary in report.summaries:
        yield from _summary_lines(summary)
    for level, meaning in LEVELS.items():
        findings = report.of(level)
        if findings:
            yield f"\n{level.capitalize()}s ({meaning})"
        for finding in findings:
            yield f"  {finding.split}: {finding.headline}. {finding.meaning}"
            for example in finding.examples[:_MAX_EXAMPLES]:
                yield f"      {textwrap.shorten(example, _WIDTH)}"
            if len(finding.examples) > _MAX_EXAMPLES:
                yield f"      … {len(finding.examples) - _MAX_EXAMPLES:,} more"
    yield from _class_lines(report.summaries)
    yield f"\nResult: {report.result()}"


def _summary_lines(summary: Summary) -> Iterator[str]:
    """Yield the lines of one split."""
    objects = sum(summary.counts.values())
    unit = f"{objects:,} objects, " if summary.areas is not None else ""
    yield f"\n{summary.split}: {summary.images:,} images, {unit}{len(summary.counts):,} classes"
    yield f"  {summary.source}"
    if summary.areas is not None and objects:
        sizes = coco_sizes(summary.areas)
        words = ", ".join(
            f"{name} {count:,} ({count / objects:.0%})" for name, count in sizes.items()
        )
        yield f"  object sizes as in COCO: {words}"
    if summary.decoded is None:
        yield "  the images were not read: add --images"
    else:
        yield f"  {summary.decoded:,} images decoded"


def _class_lines(summaries: list[Summary]) -> Iterator[str]:
    """Yield the table of objects or images by class, the most common first."""
    if not summaries:
        return
    names = sorted(summaries[0].counts, key=lambda name: -summaries[0].counts[name])
    unit = "Images" if summaries[0].areas is None else "Objects"
    shown = names
    if len(names) > _MAX_CLASSES:
        shown = [*names[: _MAX_CLASSES // 2], "…", *names[-_MAX_CLASSES // 2 :]]
    width = max(len(name) for name in [*shown, "class"])
    yield f"\n{unit} by class"
    yield "  " + " ".join(["class".ljust(width), *(f"{s.split:>10}" for s in summaries)])
    for name in shown:
        numbers = (f"{s.counts.get(name, 0):>10,}" if name != "…" else "" for s in summaries)
        yield ("  " + " ".join([name.ljust(width), *numbers])).rstrip()
