"""The report as one HTML page without other files: plots are inline SVG."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from datasets.check.findings import LEVELS, Report, Summary
from datasets.check.sizes import BINS, coco_sizes, histogram

__all__ = ["format_page"]

_MAX_EXAMPLES = 100
# Above this number of classes, only the most common and the rarest are drawn.
_MAX_CLASSES = 200
_COLORS = {"train": "#4477aa", "val": "#ee8866"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .15rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
.error { border-left: .4rem solid #cc3311; } .warning { border-left: .4rem solid #ee7733; }
.note { border-left: .4rem solid #bbbbbb; } .finding { padding-left: .8rem; margin: .8rem 0; }
code { overflow-wrap: anywhere; } svg text { font: 12px system-ui, sans-serif; }
"""


def format_page(report: Report) -> str:
    """Return the report as an HTML page.

    Args:
        report: The report.
    """
    title = f"Data set check: {escape(_printable(report.title))}"
    body = "\n".join([f"<h1>{title}</h1>", *_sections(report)])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _sections(report: Report) -> Iterator[str]:
    """Yield the parts of the page."""
    yield f"<p><b>{report.result()}</b></p>"
    yield _overview(report.summaries)
    for level, meaning in LEVELS.items():
        findings = report.of(level)
        if findings:
            yield f"<h2>{level.capitalize()}s ({meaning})</h2>"
        for finding in findings:
            yield f'<div class="finding {level}"><b>{escape(finding.split)}: '
            yield f"{escape(finding.headline)}.</b> {escape(_printable(finding.meaning))}"
            if finding.examples:
                yield "<details><summary>Show</summary><ul>"
                for example in finding.examples[:_MAX_EXAMPLES]:
                    yield f"<li><code>{escape(_printable(example))}</code></li>"
                if len(finding.examples) > _MAX_EXAMPLES:
                    yield f"<li>… {len(finding.examples) - _MAX_EXAMPLES:,} more</li>"
                yield "</ul></details>"
            yield "</div>"
    detected = [summary for summary in report.summaries if summary.areas is not None]
    if detected:
        yield "<h2>Object sizes</h2><p>Side in pixels of a square with the object's area. COCO's "
        yield "metrics call objects small below 32 and large above 96.</p>"
        yield _bars(BINS, {s.split: histogram(s.areas) for s in detected})
    if report.summaries:
        first = report.summaries[0]
        names = sorted(first.counts, key=lambda name: -first.counts[name])
        yield f"<h2>{'Objects' if detected else 'Images'} by class</h2>"
        if len(names) > _MAX_CLASSES:
            half = _MAX_CLASSES // 2
            yield f"<p>The {half} most common and the {half} rarest of {len(names):,} classes.</p>"
            names = names[:half] + names[-half:]
        yield _bars(names, {s.split: [s.counts.get(n, 0) for n in names] for s in report.summaries})


def _overview(summaries: Sequence[Summary]) -> str:
    """Return the table of the splits."""
    head = ["split", "images", "decoded", "classes", "objects", "small", "medium", "large"]
    rows = [head]
    for summary in summaries:
        decoded = "not read" if summary.decoded is None else f"{summary.decoded:,}"
        row = [summary.split, f"{summary.images:,}", decoded, f"{len(summary.counts):,}"]
        if summary.areas is not None:
            sizes = coco_sizes(summary.areas)
            row += [f"{n:,}" for n in (sum(summary.counts.values()), *sizes.values())]
        rows.append(row)
    cells = [
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * len(summaries)], rows, strict=True)
    ]
    lines = "".join(f"<tr>{line}</tr>" for line in cells)
    sources = "".join(
        f"<br>{s.split}: <code>{escape(_printable(s.source))}</code>" for s in summaries
    )
    return f"<table>{lines}</table><p>{sources.removeprefix('<br>')}</p>"


def _bars(names: Sequence[str], values: Mapping[str, Sequence[int]]) -> str:
    """Return a horizontal bar plot: one group of bars for each name, one color for each split.

    Each split has a scale of its own, so that a small one remains visible.
    """
    step, left, width = 15, 180, 420
    height = step * len(values) + 8
    parts = []
    for row, name in enumerate(names):
        top = row * height
        label = name if len(name) <= 24 else f"{name[:23]}…"
        parts.append(
            f'<text x="{left - 8}" y="{top + height / 2 + 3}" text-anchor="end">'
            f"{escape(_printable(label))}</text>"
        )
        for number, (split, counts) in enumerate(values.items()):
            length = width * counts[row] / max(1, *counts)
            y = top + 4 + number * step
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{step - 2}" '
                f'fill="{_COLORS[split]}"/><text x="{left + length + 4:.1f}" y="{y + 11}">'
                f"{counts[row]:,}</text>"
            )
    legend = ", ".join(
        f'<span style="color: {_COLORS[split]}">■</span> {split} ({sum(counts):,})'
        for split, counts in values.items()
    )
    total = height * len(names)
    svg = f'<svg width="720" height="{total}">{"".join(parts)}</svg>'
    return f"<p>{legend}; the scales differ</p>{svg}"


def _printable(text: str) -> str:
    """Return a text that UTF-8 can store; names of files may have other bytes."""
    return text.encode("utf-8", "backslashreplace").decode()
