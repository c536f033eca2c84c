"""Draw the learning curves of one or several runs from their `log.txt`.

    python -m scripts.plot RUN... [--output FILE.png] [--metrics NAME...]

A RUN is an output folder or a log file with one JSON line per epoch. Logs of DeiT and DETR have
this form too.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import UserError, require, run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PANELS", "draw", "main", "parse_args", "read_log"]

PANELS = {
    "loss": ("train_loss", "test_loss"),
    "top-1 accuracy in %": ("test_acc1", "test_ema_acc1"),
    "box AP": ("test_AP", "test_AP50", "test_ema_AP"),
    "mask AP": ("test_segm_AP", "test_segm_AP50"),
    "learning rate": ("train_lr",),
}
"""Panels of the default picture: title → metrics. A panel without any curve is left out."""

_STYLES = ("-", "--", ":", "-.")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(
        prog="scripts.plot", description="Draw the learning curves of runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder, or its log.txt")
    parser.add_argument(
        "--output", metavar="FILE", help="picture (default: curves.png in the first run's folder)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="metrics of log.txt to draw, each in its panel, such as test_acc1 train_data_s",
    )
    return parser.parse_args(argv)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the epochs of a log; lines that a crash has cut are left out.

    Args:
        path: Log file, or the folder of `log.txt`.

    Raises:
        UserError: The file does not exist, or has no epoch.
    """
    file = path / "log.txt" if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read {file}: {reason}") from error
    epochs = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            epochs.append(record)
    if not epochs:
        raise UserError(f"{file} has no finished epoch")
    return sorted(epochs, key=lambda record: record["epoch"])


def draw(
    logs: dict[str, list[dict[str, Any]]], path: Path, metrics: Sequence[str] | None = None
) -> None:
    """Draw the curves of runs, one color for each run.

    Args:
        logs: Epochs of each run by its name.
        path: Picture to write; its ending sets the format.
        metrics: Metrics to draw; None for `PANELS`.

    Raises:
        UserError: No run has one of the metrics, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    known = {name for log in logs.values() for record in log for name in record}
    if metrics is not None and (unknown := [name for name in metrics if name not in known]):
        numbers = ", ".join(sorted(known - {"epoch", "n_parameters"}))
        raise UserError(f"no run has the metric {unknown[0]}; they have {numbers}")
    panels = PANELS if metrics is None else {name: (name,) for name in metrics}
    panels = {title: names for title, names in panels.items() if known & set(names)}
    if not panels:
        raise UserError("no run has a metric of the default picture; name some with --metrics")
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6, 4.5 * columns), 3.8 * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, names) in zip(all_axes, panels.items(), strict=False):
        _draw_panel(axes, logs, [name for name in names if name in known])
        axes.set_title(title, parse_math=False)
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        # matplotlib raises ValueError for an unknown ending.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; see --output") from error


def _draw_panel(
    axes: "Axes", logs: dict[str, list[dict[str, Any]]], metrics: Sequence[str]
) -> None:
    """Draw metrics of all runs: a color for each run, a line style for each metric."""
    from matplotlib.ticker import MaxNLocator

    for number, (run_name, log) in enumerate(logs.items()):
        for style, name in zip(_STYLES, metrics, strict=False):
            points = [(r["epoch"], r[name]) for r in log if isinstance(r.get(name), int | float)]
            if not points:
                continue
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=f"C{number % 10}",
                label="  ".join([run_name] * (len(logs) > 1) + [name] * (len(metrics) > 1)),
                marker="." if len(points) < 30 else None,
            )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(logs) > 1 or len(metrics) > 1:
        axes.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the curves of the runs that the flags name."""
    args = parse_args(argv)
    require("matplotlib", "scripts.plot")
    paths = [Path(name) for name in args.runs]
    names = _names(paths)
    first = paths[0] if paths[0].is_dir() else paths[0].parent
    output = Path(args.output) if args.output else first / "curves.png"
    logs = {name: read_log(path) for name, path in zip(names, paths, strict=True)}
    draw(logs, output, args.metrics)
    print(output)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the name of each run: its folder, or its path where two folders have one name."""
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in paths]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return names


if __name__ == "__main__":
    run(main)
