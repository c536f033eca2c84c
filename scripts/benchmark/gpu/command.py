"""Check and measure everything that needs a GPU, in eight minutes, without anybody watching.

    python -m scripts.benchmark gpu --output gpu.json              on a GPU
    python -m scripts.benchmark gpu --output cpu.json --dry_run    the same code on a CPU, tiny

Sections: correctness (CUDA and Triton against float64), extension (the CUDA extension is built and
tested), end_to_end (NCCL, gradient scaling, digits and scenes trained to their gates), attention
(time and memory over flash attention) and train (images per second over models without iRPE). The
first three run at the same time, the others alone.

Every result is in FILE at once. The same command continues with the checks that have no result. A
report in Markdown is written to FILE with .md instead of .json, and the output of all checks to
FILE with .log. torch, timm, Triton and numpy are needed; a check that needs more is skipped with
the reason. Exit status: 1 if a check of correctness failed, 2 for an invalid option.
"""

import argparse
import hashlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmark.gpu.client import ROOT, WORKER, NoReplyError
from scripts.benchmark.gpu.report import markdown
from scripts.benchmark.gpu.results import OtherResultsError, Results
from scripts.benchmark.gpu.schedule import Run
from scripts.benchmark.gpu.sections import SECTIONS

__all__ = ["main", "parse_args"]

# Seconds for the first process to start, which imports torch and finds the GPU.
_START_LIMIT = 120


def _sections(text: str) -> list[str]:
    """Convert `a,b` to names of sections."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"must be names from {', '.join(SECTIONS)}, got {unknown[0]!r}"
        )
    return [name for name in SECTIONS if name in names]


def _positive(text: str) -> float:
    """Convert an argument to a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="JSON file to write or continue"
    )
    parser.add_argument(
        "--sections",
        type=_sections,
        default=list(SECTIONS),
        metavar="NAME,NAME",
        help=f"Sections to run: {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="Run only checks with this text in their name"
    )
    parser.add_argument(
        "--restart", action="store_true", help="Delete earlier results of these sections first"
    )
    parser.add_argument(
        "--minutes",
        type=_positive,
        default=8.0,
        metavar="N",
        help="Minutes that the run may take (default: 8)",
    )
    parser.add_argument(
        "--lanes",
        type=_positive,
        default=8,
        metavar="N",
        help="Largest number of processes that check correctness at a time (default: 8)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Run tiny versions of all checks on the CPU"
    )
    args = parser.parse_args(argv)
    if args.output.suffix != ".json":
        parser.error(f"--output must end in .json, got {str(args.output)!r}")
    return args


def main(argv: Sequence[str] | None = None, worker: Sequence[str] = WORKER) -> int:
    """Run the benchmark.

    Args:
        argv: The command line.
        worker: Command of a process that runs checks.

    Returns:
        The exit status.
    """
    args = parse_args(argv)
    try:
        results = Results(args.output)
    except OtherResultsError as error:
        return _refuse(str(error))
    if args.restart:
        results.forget(args.sections)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.with_suffix(".log").open("ab") as log:
        run = Run(
            results,
            worker,
            _environment(args),
            log,
            seconds=60 * args.minutes,
            only=args.only,
            lanes=max(1, int(args.lanes)),
            on_gpu=not args.dry_run,
        )
        previous = signal.signal(signal.SIGTERM, _stop)
        try:
            if refusal := _begin(run):
                return _refuse(refusal)
            run.run(args.sections)
        finally:
            run.close()
            signal.signal(signal.SIGTERM, previous)
            if results.machine:
                results.write()
                report = args.output.with_suffix(".md")
                report.write_text(markdown(results))
    run.say(f"wrote {args.output} and {report}")
    return _status(results)


def _environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the variables of the processes that run checks."""
    build = _build_folder()
    path = os.pathsep.join([str(ROOT), str(build), os.environ.get("PYTHONPATH", "")])
    environment = {"IRPE_BENCHMARK_BUILD": str(build), "PYTHONPATH": path}
    if args.dry_run:
        environment |= {"IRPE_BENCHMARK_DRY_RUN": "1", "TRITON_INTERPRET": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
    # Several processes run at a time, and the work is on the GPU.
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "4")
    return environment


def _build_folder() -> Path:
    """Return the folder of the compiled extension, one per checkout, in the user's cache."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    root = Path(cache or "~/.cache").expanduser().absolute()
    return root / "irpe_gpu_benchmark" / hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]


def _begin(run: Run) -> str:
    """Ask a process for the machine; return why the run cannot begin, empty if it can."""
    client = run.client()
    try:
        machine = client.ask(_START_LIMIT, do="machine")
    except NoReplyError as error:
        run.end_client(client)
        return f"the first process failed: {error}; see {run.log.name}"
    run.release(client)
    if "error" in machine:
        return machine["error"]
    try:
        run.results.begin(machine)
    except OtherResultsError as error:
        return str(error)
    run.say(f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}")
    return ""


def _status(results: Results) -> int:
    """Print the failures and return the exit status."""
    failures = results.failures()
    for section, check, message in failures:
        print(f"FAILED: {section}: {check}: {(message or '-').splitlines()[0]}", file=sys.stderr)
    return int(any(not SECTIONS[section].is_timed for section, _, _ in failures))


def _refuse(message: str) -> int:
    """Print why the run cannot begin, and return the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def _stop(number: int, frame: object) -> None:
    """Leave the run on SIGTERM; the results so far are written."""
    raise SystemExit(128 + number)
