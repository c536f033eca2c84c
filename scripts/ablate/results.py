"""The result of a cell: `result.json` in its folder, written when its training is complete."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import UsageError, replacing
from scripts.ablate.cells import Ablation, Cell
from scripts.ablate.trainers import images_per_step
from scripts.plot import read_log

__all__ = [
    "check_folder",
    "claim_folder",
    "finished",
    "metric_at",
    "read_result",
    "training_record",
    "write_json",
]

_ABLATION = "ablation.json"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, atomically."""
    with replacing(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_result(cell: Cell, output_dir: Path) -> dict[str, Any] | None:
    """Return the result of a cell; None if its training is not complete."""
    try:
        content = json.loads((output_dir / cell.folder / "result.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "metrics" in content else None


def finished(cell: Cell, output_dir: Path) -> bool:
    """Return whether a cell is trained and evaluated at all points."""
    result = read_result(cell, output_dir)
    return result is not None and all(
        metric_at(cell, result, label) is not None for label in cell.evaluations
    )


def metric_at(cell: Cell, result: Mapping[str, Any], label: str) -> dict[str, float] | None:
    """Return the metrics of a cell at a point; None if it is not evaluated with its options."""
    if label not in cell.evaluations or cell.is_trained_at(label):
        return result["metrics"]
    evaluation = result["evaluations"].get(label)
    if evaluation is None or evaluation["options"] != dict(cell.evaluations[label]):
        return None
    return evaluation["metrics"]


def training_record(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return the metrics of the last epoch of a complete training, and its speed.

    Raises:
        UserError: The log cannot be read, or has no epoch.
    """
    log = read_log(folder)
    speeds = [epoch["train_images_per_s"] for epoch in log if "train_images_per_s" in epoch]
    return {
        "cell": cell.name,
        "options": dict(cell.options),
        "metrics": log[-1],
        "evaluations": {},
        # Of the fastest epoch, because other programs on the machine can only slow it down.
        "step_s": images_per_step(cell.config) / max(speeds) if speeds else None,
        "classes": _classes(folder),
    }


def _classes(folder: Path) -> int | None:
    """Return the number of classes in the details of the last evaluation."""
    try:
        rows = json.loads((folder / "metrics_per_class.json").read_text("utf-8"))["model"]
    except (OSError, ValueError, KeyError):
        return None
    return len(rows) if isinstance(rows, list) else None


def claim_folder(ablation: Ablation, output_dir: Path) -> None:
    """Record the ablation in its folder, which is new or has the same ablation.

    Variants, seeds and points may differ from the record: each cell records its own options.

    Raises:
        UsageError: The folder has another ablation, or other files.
    """
    check_folder(ablation, output_dir)
    write_json(
        output_dir / _ABLATION,
        {"name": ablation.name, "file": ablation.file.model_dump(mode="json")},
    )


def check_folder(ablation: Ablation, output_dir: Path) -> None:
    """Raise UsageError if a folder has another ablation, or other files."""
    path = output_dir / _ABLATION
    own = (ablation.name, ablation.file.trainer)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = (content["name"], content["file"]["trainer"])
    except FileNotFoundError:
        if output_dir.is_dir() and any(not p.name.startswith(".") for p in output_dir.iterdir()):
            raise UsageError(
                f"--output_dir {output_dir} must be new, empty or have this ablation, got other "
                "files"
            ) from None
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} must be the record of an ablation: {error}") from error
    if recorded != own:
        raise UsageError(
            f"--output_dir {output_dir} must be new or have this ablation ({' of '.join(own)}), "
            f"got that of {' of '.join(recorded)}"
        )
