"""The Markdown report of the results: failures first, then one part per section."""

from collections import Counter
from collections.abc import Iterator

from scripts.benchmark.gpu.results import Results
from scripts.benchmark.gpu.sections import SECTIONS

__all__ = ["markdown"]

_MESSAGE_CHARACTERS = 300


def markdown(results: Results) -> str:
    """Return the report."""
    parts = [_heading(results.machine), _failures(results), _overview(results)]
    writers = {
        "correctness": _correctness,
        "extension": _facts,
        "attention": _attention,
        "train": _train,
        "end_to_end": _facts,
    }
    for name, section in SECTIONS.items():
        kept = results.sections.get(name)
        if kept and kept["results"]:
            parts.append(f"## {section.title}\n\n" + writers[name](kept["results"]))
            parts.append(_skipped(kept["results"]))
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _heading(machine: dict) -> str:
    """Return the title with the machine and the versions."""
    kind = "Dry run on a CPU" if machine["dry_run"] else "Results on a GPU"
    lines = [f"# {kind}: {machine['device']}", ""]
    if machine["dry_run"]:
        lines += [
            "The sizes are tiny, and Triton ran in its interpreter: the times say nothing about a "
            "GPU.",
            "",
        ]
    names = ("torch", "cuda", "triton", "timm", "python")
    versions = [f"{name} {machine[name]}" for name in names if machine.get(name)]
    hardware = [f"{machine['cores']} CPU cores"]
    if "gpus" in machine:
        hardware.append(f"{machine['gpus']} GPU with {machine['gpu_memory_gb']} GB")
        hardware.append(f"compute capability {machine['compute_capability']}")
    lines += [
        f"{', '.join(versions)}; {', '.join(hardware)}; revision "
        f"{machine.get('git') or 'unknown'}, sources {machine['sources']}.",
        "",
        "```bash",
        f"python -m scripts.benchmark gpu --output FILE{' --dry_run' * machine['dry_run']}",
        "```",
    ]
    return "\n".join(lines)


def _failures(results: Results) -> str:
    """Return all failures."""
    failures = results.failures()
    if not failures:
        return "**Failures:** none among the checks that ran."
    lines = [f"**Failures: {len(failures)}**", ""]
    return "\n".join(lines + [f"- {s}, {check}: {_line(text)}" for s, check, text in failures])


def _overview(results: Results) -> str:
    """Return the numbers of checks by section."""
    rows = []
    for name in SECTIONS:
        kept = results.sections.get(name, {"results": {}, "checks": []})
        counts = Counter(entry["status"] for entry in kept["results"].values())
        missing = len(kept["checks"]) - len(kept["results"])
        seconds = sum(entry["seconds"] for entry in kept["results"].values())
        note = kept.get("note", "") if kept["checks"] else "not run"
        numbers = [counts[status] for status in ("passed", "failed", "skipped")]
        rows.append([name, *numbers, missing, f"{seconds:.0f}", note])
    head = ["section", "passed", "failed", "skipped", "not run", "seconds of checks", "note"]
    return _grid(head, rows)


def _correctness(entries: dict[str, dict]) -> str:
    """Return the largest deviations by operator and data type, and the other checks."""
    groups: dict[tuple, list[dict]] = {}
    rest = {}
    for name, entry in entries.items():
        dtype = (entry.get("result") or {}).get("dtype")
        if dtype:
            groups.setdefault((name.partition(":")[0], dtype), []).append(entry)
        elif entry["status"] != "skipped":
            rest[name] = entry
    rows = []
    for (operator, dtype), found in groups.items():
        worst = max(found, key=lambda e: e["result"]["roundings"] / e["result"]["allowed"])
        result = worst["result"]
        count = sum(entry["result"].get("cases", 1) for entry in found)
        part = f"{result['roundings']:.2f} of {result['allowed']:g}"
        rows.append([operator, dtype, count, part, result.get("of", "sums")])
    head = ["operator", "data type", "cases", "largest deviation", "of"]
    text = (
        "Deviations from float64 are in roundings of the largest element, next to those that are "
        "allowed; for bucket sums they are a part of the error bound.\n\n"
    )
    return text + _grid(head, rows) + "\n\n" + _facts(rest)


def _attention(entries: dict[str, dict]) -> str:
    """Return one table of times and memory per shape, and one per sweep of tiles."""
    head = ["attention", "forward ms", "ratio", "forward + backward ms", "ratio", "peak MB"]
    tables: dict[str, dict[str, dict]] = {}
    notes: dict[str, list[str]] = {}
    for name, entry in entries.items():
        result = entry.get("result") or {}
        is_sweep = name.startswith("tiles, ")
        title = f"Tiles: {name.partition(': ')[2]}" if is_sweep else name
        kept = tables.setdefault(title, {})
        for attention, row in result.get("rows", {}).items():
            # The base of a sweep is measured with every change; the first is shown.
            tiles = "; ".join(result.get("tiles", []))
            is_changed = tiles and attention in name
            kept.setdefault(f"{attention}: {tiles}" if is_changed else attention, row)
        for what, why in (result.get("not run") or {}).items():
            notes.setdefault(title, []).append(f"- Not run: {what} ({_line(why)})")
    text = [
        "Ratios are to torch's flash attention without encodings in the same round (in float32 to "
        "torch's choice). Peak memory is above what was allocated before. Host is the time of the "
        "CPU until all kernels of forward and backward are launched."
    ]
    for title, rows in tables.items():
        if rows:
            lines = [[name, *_cells(row)] for name, row in rows.items()]
            text.append(f"### {title}\n\n" + _grid([*head, "host µs"], lines))
            text.append("\n".join(notes.get(title, [])))
    return "\n\n".join(part for part in text if part)


def _cells(row: dict) -> list[str]:
    """Return times, ratios, memory and host time of an attention."""
    times = [
        cell
        for kind in ("forward", "both")
        for cell in (f"{row[f'{kind}_ms']:.3f}", _ratio(row[f"{kind}_ratio"]))
    ]
    memory = row["peak_mb"]
    digits = 0 if memory >= 100 else 2
    return [*times, f"{memory:.{digits}f}", f"{row['host_us']:.0f}"]


def _train(entries: dict[str, dict]) -> str:
    """Return images per second, then the kernels of every model that was profiled."""
    head = [
        "model",
        "iRPE",
        "images/s",
        "ratio",
        "step ms",
        "kernels ms",
        "host-bound",
        "operators",
    ]
    rows, kernels = [], []
    for name, entry in entries.items():
        for spec, row in (entry.get("result") or {}).get("rows", {}).items():
            if "step_ms" not in row:
                continue
            busy = f"{row['kernels_ms']:.1f}" if "kernels_ms" in row else row.get("profile", "")
            host = f"{100 * row['host_bound']:.0f} %" if row.get("host_bound") is not None else ""
            speed = [f"{row['images_per_second']:.1f}", _ratio(row["ratio"])]
            rows.append([name, spec, *speed, f"{row['step_ms']:.1f}", busy, host, row["operators"]])
            if row.get("kernels"):
                kernels.append((f"{name}, {spec}", row["kernels"]))
    text = [
        "The ratio is images per second over those of the same model without iRPE. Host-bound is "
        "the part of a step in which no kernel runs.",
        _grid(head, rows),
    ]
    for title, found in kernels:
        lines = [[f"`{_cell(name)}`", f"{100 * share:.1f} %", f"{ms:.2f}"]
                 for name, share, ms in found]  # fmt: skip
        text.append(f"### Kernels: {title}\n\n" + _grid(["kernel", "share", "ms per step"], lines))
    return "\n\n".join(text)


def _facts(entries: dict[str, dict]) -> str:
    """Return a table with status and result of every check that was not skipped."""
    rows = []
    for name, entry in entries.items():
        if entry["status"] == "skipped":
            continue
        result = dict(entry.get("result") or {})
        result.pop("errors", None)
        facts = ", ".join(f"{key} {_value(value)}" for key, value in result.items())
        rows.append([name, entry["status"], f"{entry['seconds']:.1f}", facts])
    return _grid(["check", "status", "seconds", "result"], rows) if rows else ""


def _skipped(entries: dict[str, dict]) -> str:
    """Return the reasons of skipped checks, with the names of those that share one."""
    reasons: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry["status"] == "skipped":
            reasons.setdefault(_line(entry["message"]), []).append(name)
    return "\n".join(f"- Skipped ({why}): {', '.join(_few(n))}" for why, n in reasons.items())


def _few(names: list[str]) -> Iterator[str]:
    """Return the first names, and the number of the others."""
    yield from (f"`{name}`" for name in names[:4])
    if len(names) > 4:
        yield f"and {len(names) - 4} more"


def _ratio(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return "" if value is None else f"{value:.2f}"


def _value(value: object) -> str:
    """Return a number or a text for a cell."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    """Return a text as one line of limited length."""
    return " ".join(text.split())[:_MESSAGE_CHARACTERS]


def _cell(text: object) -> str:
    """Return the text of a cell; a bar would end it."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _grid(head: list[str], rows: list[list]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
