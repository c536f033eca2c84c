"""The plot of an ablation: dots and intervals of variants, or curves over points."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.ablate.file import AblationFile
from scripts.ablate.statistics import mean_interval, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

Values = Callable[[str, str], Mapping[int, float]]

_LARGEST_LINEAR = 10  # ratio of the largest to the smallest point on a linear axis
_MARKERS = "osD^vP"
_STYLES = ("-", "--", ":")


def draw(file: AblationFile, values: Values, path: Path) -> None:
    """Draw the metric of all variants.

    Args:
        file: The ablation.
        values: Function of a variant and a point that returns the metric by seed.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    count = len(file.variants)
    size = (6.8, 4.2) if file.axis else (max(4.0, 1.2 + 0.75 * count), 4.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    if file.axis:
        _draw_curves(axes, file, values)
    else:
        _draw_variants(axes, file, values)
    axes.set_ylabel(file.metric)
    axes.grid(alpha=0.3, axis="both" if file.axis else "y")
    figure.savefig(path, dpi=130, format="png")


def _draw_variants(axes: "Axes", file: AblationFile, values: Values) -> None:
    """Draw a dot for each seed, and the mean with its interval, for each variant."""
    for place, variant in enumerate(file.variants):
        found = values(variant, "")
        if not found:
            continue
        color = f"C{place % 10}"
        axes.plot(
            [place - 0.15] * len(found), list(found.values()), "o", color=color, alpha=0.5, ms=4
        )
        mean = summary(found).mean
        interval = mean_interval(found)
        errors = None
        if interval is not None:
            errors = [[mean - interval[0]], [interval[1] - mean]]
        axes.errorbar(
            [place + 0.1], [mean], yerr=errors, fmt="D", color=color, ms=5, capsize=4, lw=1.5
        )
    long = max(map(len, file.variants)) > 8 or len(file.variants) > 6
    axes.set_xticks(
        range(len(file.variants)),
        list(file.variants),
        rotation=35 if long else 0,
        ha="right" if long else "center",
        parse_math=False,
    )
    axes.set_xlim(-0.6, len(file.variants) - 0.4)
    axes.set_title("dots: seeds; diamond: mean with 95 % interval", fontsize=9)


def _draw_curves(axes: "Axes", file: AblationFile, values: Values) -> None:
    """Draw the mean over points for each variant, with the interval of the mean as a band."""
    places, is_numeric = _places(file.points)
    for number, variant in enumerate(file.variants):
        found = [(x, values(variant, p)) for x, p in zip(places, file.points, strict=True)]
        found = sorted((pair for pair in found if pair[1]), key=lambda pair: pair[0])
        if not found:
            continue
        color = f"C{number % 10}"
        xs = [x for x, _ in found]
        axes.plot(
            xs,
            [summary(by_seed).mean for _, by_seed in found],
            _STYLES[number // 10 % len(_STYLES)],
            marker=_MARKERS[number % len(_MARKERS)],
            ms=4.5,
            color=color,
            label=variant,
        )
        bands = [(x, interval) for x, s in found if (interval := mean_interval(s)) is not None]
        if bands:
            lows, highs = zip(*(interval for _, interval in bands), strict=True)
            axes.fill_between([x for x, _ in bands], lows, highs, color=color, alpha=0.15, lw=0)
    if is_numeric and min(places) > 0 and max(places) > _LARGEST_LINEAR * min(places):
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(places, file.points, parse_math=False)
    axes.set_xlabel(file.axis, parse_math=False)
    axes.set_title("mean over seeds with 95 % interval", fontsize=9)
    if not axes.lines:
        return
    if len(file.variants) <= 6:
        axes.legend(fontsize=8)
    else:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _places(points: list[str]) -> tuple[list[float], bool]:
    """Return the positions of points: their numbers, or 0, 1, … for words."""
    try:
        return [float(point) for point in points], True
    except ValueError:
        return [float(place) for place in range(len(points))], False
