"""Model zoo: list, download and evaluate the published models.

    python -m scripts.zoo list                 published metrics, configurations, cached checkpoints
    python -m scripts.zoo list --urls          URLs of checkpoints and training logs
    python -m scripts.zoo table                parameters and MACs, counted and published
    python -m scripts.zoo download             checkpoints into the torch hub cache
    python -m scripts.zoo evaluate --imagenet ./ImageNet --coco ./coco_data --nproc 8
    python -m scripts.zoo readme [--check]     tables of README.md, generated from configs/zoo.yaml

Exit code: 0 on success, 1 if a command fails or a result differs from the published one, 2 for an
invalid option.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from engine import UsageError, UserError, check_writable, init_distributed, replacing, run
from engine.launcher import launched_as
from irpe_core import CheckpointError
from scripts.zoo import tables
from scripts.zoo.checkpoints import fetch
from scripts.zoo.evaluate import EvalOptions, evaluate_rows
from scripts.zoo.macs import cost_of
from scripts.zoo.report import Report
from scripts.zoo.rows import ROOT, TASKS, ZOO, Zoo, load_zoo


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are instances of UsageError."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage."""
        raise UsageError(f"{message} (--help lists all options)")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: The command or an option is invalid.
    """
    parser = _Parser(
        prog="python -m scripts.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        summary = function.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        if name == "readme":
            command.add_argument(
                "--check", action="store_true", help="Only check that the tables are up to date"
            )
            command.add_argument(
                "--readme",
                type=Path,
                default=ROOT / "README.md",
                metavar="FILE",
                help="File to write (default: README.md)",
            )
        command.add_argument(
            "--zoo",
            type=Path,
            default=ZOO,
            metavar="FILE",
            help="YAML file of the model zoo (default: configs/zoo.yaml)",
        )
        if name != "readme":
            command.add_argument(
                "--rows",
                nargs="+",
                metavar="ROW",
                help="Rows to use: names from `list`, or classification or detection "
                "(default: all)",
            )
        if name == "list":
            command.add_argument(
                "--urls", action="store_true", help="List the URLs of checkpoints and logs instead"
            )
        if name in ("download", "evaluate"):
            command.add_argument(
                "--mirror",
                metavar="FOLDER|URL",
                help="Folder or URL of checkpoints to use instead of the published URLs",
            )
        if name == "evaluate":
            _add_evaluation(command)
    return parser.parse_args(argv)


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    command.add_argument(
        "--imagenet",
        metavar="FOLDER",
        help="ImageNet: folder with val/, or with val.tar for --load-tar",
    )
    command.add_argument(
        "--coco",
        metavar="FOLDER",
        help="COCO 2017: folder with annotations/ and either val2017/ or val2017.zip",
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/zoo"),
        metavar="FOLDER",
        help="Output folder of the report (default: outputs/zoo)",
    )
    command.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="Number of processes (default: 1)"
    )
    command.add_argument(
        "--device", default="auto", help="Device: auto, cpu, cuda or cuda:N (default: auto)"
    )
    command.add_argument("--dtype", help="Data type of automatic mixed precision (default: auto)")
    command.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="Number of data loading processes per process (default: as in the trainer)",
    )
    command.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="Batch size of classifiers per process; detectors use the published 2",
    )
    command.add_argument(
        "--load-tar", action="store_true", help="Read ImageNet from val.tar without unpacking it"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command of the zoo.

    Raises:
        UsageError: An option, a row or a file is invalid.
        UserError: The command failed, or a result differs from the published one.
    """
    args = parse_args(argv)
    COMMANDS[args.command](args, load_zoo(args.zoo))


def list_rows(args: argparse.Namespace, zoo: Zoo) -> None:
    """List published metrics, configurations and cached checkpoints, or URLs."""
    rows = zoo.choose(args.rows)
    if args.urls:
        print(tables.urls(rows), end="")
        return
    for task in TASKS:
        if of_task := [row for row in rows if row.task == task]:
            print(tables.overview(of_task))
    print(f"Published metrics: {zoo.source}.")


def table(args: argparse.Namespace, zoo: Zoo) -> None:
    """Count parameters and MACs and compare them with the published ones."""
    rows = zoo.choose(args.rows)
    costs = [cost_of(row) for row in rows]
    print(tables.cost_table(rows, costs), end="")
    if differing := tables.differing_costs(rows, costs):
        raise UserError("; ".join(differing))


def download(args: argparse.Namespace, zoo: Zoo) -> None:
    """Download checkpoints into the torch hub cache."""
    failed = []
    for row in zoo.choose(args.rows, with_checkpoint=True):
        if row.checkpoint is None:
            print(f"{row.name}: its checkpoint is not published")
            continue
        try:
            print(f"{row.name}: {fetch(row, args.mirror)}", flush=True)
        except CheckpointError as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            failed.append(row.name)
    if failed:
        raise UserError(f"not downloaded: {', '.join(failed)}")


def evaluate(args: argparse.Namespace, zoo: Zoo) -> None:
    """Evaluate checkpoints and compare their metrics with the published ones."""
    rows = zoo.choose(args.rows, with_checkpoint=True)
    if launched_as()[2] > 1:
        raise UsageError("evaluate must be started without torchrun; --nproc N starts N processes")
    if args.nproc < 1:
        raise UsageError(f"--nproc must be at least 1, got {args.nproc}")
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {args.batch_size}")
    if not args.imagenet and not args.coco:
        raise UsageError("evaluate needs a data set: --imagenet FOLDER, --coco FOLDER or both")
    given = {"--dtype": args.dtype, "--num-workers": args.num_workers}
    flags = [word for flag, value in given.items() if value is not None for word in (flag, value)]
    flags = [str(word) for word in flags]
    of_classifiers = ["--batch-size", str(args.batch_size)] if args.batch_size is not None else []
    of_classifiers += ["--load-tar"] if args.load_tar else []
    options = EvalOptions(
        data={"classification": args.imagenet, "detection": args.coco},
        mirror=args.mirror,
        nproc=args.nproc,
        device=args.device,
        resolved_device=init_distributed(args.device),
        flags={"classification": flags + of_classifiers, "detection": flags},
    )
    report = Report(check_writable(args.output), zoo)
    try:
        bad = evaluate_rows(rows, options, report)
    except KeyboardInterrupt:
        print(f"finished rows are kept in {args.output}: run the same command again to continue")
        raise
    print(f"report: {args.output / 'zoo.md'} (also zoo.json and zoo.csv)")
    if bad:
        raise UserError(
            f"{len(bad)} of {len(rows)} rows failed or are outside the tolerance: {', '.join(bad)}"
        )


def readme(args: argparse.Namespace, zoo: Zoo) -> None:
    """Write the tables of published models into README.md, or check them."""
    try:
        text = args.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--readme {args.readme}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--readme {args.readme}: not a text file in UTF-8") from error
    filled, found = tables.fill_in(text, zoo)
    if missing := {row.task for row in zoo.rows} - found:
        raise UserError(
            f"{args.readme} must have the lines '<!-- zoo: {min(missing)} -->' and "
            f"'<!-- end of zoo -->' around the table of {min(missing)}"
        )
    if args.check and filled != text:
        raise UserError(f"{args.readme} is out of date: run python -m scripts.zoo readme")
    if not args.check:
        with replacing(args.readme) as temporary:
            temporary.write_text(filled, encoding="utf-8")


COMMANDS = {
    "list": list_rows,
    "table": table,
    "download": download,
    "evaluate": evaluate,
    "readme": readme,
}

if __name__ == "__main__":
    run(main)
