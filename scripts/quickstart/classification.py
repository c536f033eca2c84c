"""The classification half of the quickstart: table and gates.

    python -m scripts.quickstart.classification OUTPUT_DIR

Reads the logs of the four runs and the evaluation in OUTPUT_DIR; exit code 1 where a gate fails.
"""

import json
import sys
from pathlib import Path

# Folder of the run → what the model knows of positions.
RUNS = {
    "absolute_irpe": "absolute + iRPE",
    "irpe": "iRPE alone",
    "absolute": "absolute alone",
    "neither": "neither",
}
MIN_ACC1 = 94.0
MIN_GAIN = 10.0


def last_line(folder: Path) -> dict:
    """The last epoch of a run's log."""
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def failed_gates(results: dict[str, dict], evaluated: dict) -> list[str]:
    """What should hold and does not."""
    acc1 = {name: line["test_acc1"] for name, line in results.items()}
    failures = []
    if acc1["absolute_irpe"] < MIN_ACC1:
        failures.append(f"absolute + iRPE reached {acc1['absolute_irpe']:.1f} %, not {MIN_ACC1} %")
    gain = acc1["irpe"] - acc1["neither"]
    if gain < MIN_GAIN:
        failures.append(f"iRPE alone gains {gain:.1f} points over nothing, not {MIN_GAIN}")
    for key in ("test_acc1", "test_acc5", "test_loss"):
        trained = results["absolute_irpe"][key]
        if evaluated[key] != trained:
            failures.append(f"--eval gives {key} {evaluated[key]}, training gave {trained}")
    return failures


def main(folder: Path) -> int:
    """Print the table; 0 when every gate is met."""
    results = {name: last_line(folder / name) for name in RUNS}
    print(f"\n{'position encoding':<18} {'top-1 %':>8} {'parameters':>11}")
    for name, title in RUNS.items():
        line = results[name]
        print(f"{title:<18} {line['test_acc1']:>8.1f} {line['n_parameters']:>11,}")
    print(
        "\n359 validation images: one is 0.28 points, and seeds differ by about 2. The random\n"
        "split puts every writer into both halves; split by writer, accuracies are lower.\n"
        "What this shows: iRPE alone can take the place of the absolute embedding.\n"
        "What it does not show: a gain over it."
    )
    evaluated = json.loads((folder / "evaluation" / "eval.json").read_text())
    failures = failed_gates(results, evaluated)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if not failures:
        print("\nKilled, resumed and evaluated: the evaluation equals the training's own figures.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
