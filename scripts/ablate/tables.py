"""The tables of an ablation, as Markdown."""

from collections.abc import Mapping

from scripts.ablate.collected import Collected
from scripts.ablate.statistics import Difference, Summary
from scripts.ablate.trainers import lower_is_better
from scripts.zoo.tables import markdown

__all__ = ["to_markdown"]

_CAPTION = """\
{metric}: mean ± sample standard deviation over the seeds {seeds}
(n = {count}, unless another n is given).
Difference: mean difference to *{reference}*, paired by seed, with the 95 % interval of the paired t
test. "not shown": the interval contains zero, or there is none. Intervals are per comparison, not
corrected for the number of comparisons.{better}
"""
_COSTS = """\
Parameters that are trained; MACs of one image, counted. Time per training step: relative to
*{reference}*, of the fastest epoch of all seeds, with the loading of data; {jobs}.
"""
_COST_NAMES = ("parameters", "MACs", "time per step")


def to_markdown(
    collected: Collected, costs: Mapping[str, Mapping[str, float | None]], command: str
) -> str:
    """Return the report as Markdown.

    Args:
        collected: Results of the cells.
        costs: Parameters, MACs and seconds per step of each variant.
        command: Command line that runs the ablation.
    """
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
        count = len(collected.rows)
        names = "; ".join(collected.missing)
        parts.append(f"Missing: {len(collected.missing)} of {count} metrics ({names}).\n")
    return "\n".join(parts)


def _decimals(collected: Collected) -> int:
    """Return the number of decimals of a metric: 2 for percent, 4 for numbers around 1."""
    values = [abs(value) for _, _, value in collected.rows if value is not None]
    return 2 if max(values, default=0.0) >= 10 else 4


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
    for variant in collected.ablation.file.variants:
        if variant == collected.ablation.reference:
            continue
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


def _jobs(collected: Collected) -> str:
    """Return how many cells ran at once, in words."""
    counts = collected.job_counts
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
    return (
        f"Machine: {names}. Sum of the times of all cells, without interrupted starts: "
        f"{seconds / 60:.1f} minutes.\n"
    )
