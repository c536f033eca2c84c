"""Put faults into everything that the programs read, and into their processes.

    python -m tests.campaign [--seed N] [--rounds N] [--only CLASS ...] [--output FILE.json]

A case ends well with the exit code 1 or 2 and one sentence that names the culprit, or with a
correct run. The table counts the cases of each class. A case depends only on the seed, its class
and its number, which a failed one prints: `--only yaml --case 17` repeats one.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.campaign.base import Base, make_base
from tests.campaign.checkpoints import checkpoints_case
from tests.campaign.configurations import flags_case, yaml_case
from tests.campaign.data import annotations_case, images_case, tars_case, zips_case
from tests.campaign.operators import operators_case
from tests.campaign.oracle import BAD, VERDICTS, Verdict
from tests.campaign.processes import kill_case, torchrun_case

CLASSES: dict[str, tuple[int, Callable[[random.Random, Base, Path], Verdict]]] = {
    "yaml": (25, yaml_case),
    "flags": (25, flags_case),
    "checkpoints": (35, checkpoints_case),
    "annotations": (35, annotations_case),
    "zips": (20, zips_case),
    "tars": (20, tars_case),
    "images": (25, images_case),
    "operators": (35, operators_case),
    "kill": (3, kill_case),
    "torchrun": (1, torchrun_case),
}
"""The number of cases in a round and the function of each class."""


def main(argv: list[str] | None = None) -> int:
    """Run the campaign, print its table, and return 1 if a case failed."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="campaign_"))
    start = time.monotonic()
    try:
        base = make_base(root / "base")
        run = partial(_run, seed=args.seed, base=base, root=root)
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("fork")) as pool:
            found = list(pool.map(run, _numbers(args)))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(table(found))
    print(f"seed {args.seed}, {len(found)} cases, {(time.monotonic() - start) / 60:.0f} minutes")
    if args.output:
        args.output.write_text(json.dumps({"seed": args.seed, "cases": found}, indent=1))
    return int(any(case["verdict"] in BAD for case in found))


def table(found: list[dict]) -> str:
    """Return the table of cases by class as Markdown."""
    rows = [["class", "cases", *VERDICTS]]
    for name in [*CLASSES, "all"]:
        cases = [case for case in found if name in (case["class"], "all")]
        counts = Counter(case["verdict"] for case in cases)
        if cases:
            rows.append([name, str(len(cases)), *(str(counts[kind]) for kind in VERDICTS)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--rounds", type=int, default=9, help="224 cases each (default: 9)")
    parser.add_argument("--only", nargs="+", choices=CLASSES, help="classes to run")
    parser.add_argument("--case", type=int, help="number of the only case to run in a class")
    parser.add_argument("--jobs", type=int, default=1, help="cases at the same time (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON file of all verdicts to write")
    return parser.parse_args(argv)


def _numbers(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the class and number of each case, round by round."""
    return [
        (name, number)
        for round_ in range(args.rounds)
        for name, (count, _) in CLASSES.items()
        for number in range(round_ * count, (round_ + 1) * count)
        if name in (args.only or CLASSES) and args.case in (None, number)
    ]


def _run(case: tuple[str, int], seed: int, base: Base, root: Path) -> dict[str, Any]:
    """Run a case and return its record; print it if it failed."""
    name, number = case
    folder = root / f"{name}_{number}"
    start = time.monotonic()
    try:
        verdict = CLASSES[name][1](random.Random(f"{seed} {name} {number}"), base, folder)
    except Exception as error:  # A fault of the campaign must not end it.
        verdict = Verdict("wrong", f"the campaign itself: {error!r}")
    seconds = round(time.monotonic() - start, 2)
    if verdict.kind in BAD:
        print(f"{name} {number}: {verdict.kind}: {verdict.note}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "class": name,
        "number": number,
        "verdict": verdict.kind,
        "note": verdict.note,
        "seconds": seconds,
    }


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
