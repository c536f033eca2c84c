"""The model zoo: tables, checkpoints, and all figures measured anew.

    python -m scripts.zoo list                  rows, figures, configurations, what is in the cache
    python -m scripts.zoo table                 parameters and MACs, computed, beside the published
    python -m scripts.zoo download              checkpoints into the torch hub cache
    python -m scripts.zoo evaluate --imagenet ./ImageNet --coco ./coco_data --nproc 8
    python -m scripts.zoo readme [--check]      the tables of README.md, made from configs/zoo.yaml

Exit code 1 where something differs from what is published, or failed; 2 for a wrong option.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from engine import UsageError, UserError, check_writable, init_distributed, replacing, run
from engine.distributed import launched_as
from irpe_core import CheckpointError
from scripts.zoo import tables
from scripts.zoo.checkpoints import fetch
from scripts.zoo.evaluate import EvalOptions, evaluate_rows
from scripts.zoo.macs import cost_of
from scripts.zoo.report import Report
from scripts.zoo.rows import ROOT, TASKS, ZOO, Zoo, load_zoo


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what the base class would print below its usage."""
        raise UsageError(f"{message} (--help lists all options)")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UsageError: It cannot be meant.
    """
    parser = _Parser(
        prog="python -m scripts.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        if name == "readme":
            command.add_argument("--check", action="store_true", help="only say if it is stale")
            command.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file")
        command.add_argument("--zoo", type=Path, default=ZOO, help="table of another zoo")
        if name != "readme":
            command.add_argument("--rows", nargs="+", metavar="ROW", help="some rows, or a task")
        if name in ("download", "evaluate"):
            command.add_argument("--mirror", help="folder or address with the checkpoints")
        if name == "evaluate":
            _add_evaluation(command)
    return parser.parse_args(argv)


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    command.add_argument("--imagenet", help="folder with val/, or with --load-tar val.tar")
    command.add_argument("--coco", help="folder with annotations/ and val2017/ or val2017.zip")
    command.add_argument("--output", type=Path, default=Path("outputs/zoo"), help="of the report")
    command.add_argument("--nproc", type=int, default=1, help="processes of one evaluation")
    command.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    command.add_argument("--dtype", help="of autocast, as for the trainers")
    command.add_argument("--num-workers", type=int, help="loading processes per process")
    command.add_argument(
        "--batch-size", type=int, help="of classifiers; detectors have the published two"
    )
    command.add_argument("--load-tar", action="store_true", help="read val.tar in place")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command of the zoo.

    Raises:
        UsageError: A wrong option, row or file.
        UserError: Something differs or failed, said in one sentence.
    """
    args = parse_args(argv)
    COMMANDS[args.command](args, load_zoo(args.zoo))


def list_rows(args: argparse.Namespace, zoo: Zoo) -> None:
    """Show rows, published figures, configurations and what is in the cache."""
    rows = zoo.choose(args.rows)
    for task in TASKS:
        if of_task := [row for row in rows if row.task == task]:
            print(f"{tables.overview(of_task)}")
    print(f"Published figures: {zoo.source}.")


def table(args: argparse.Namespace, zoo: Zoo) -> None:
    """Compute parameters and MACs and compare them with the published ones."""
    rows = zoo.choose(args.rows)
    costs = [cost_of(row) for row in rows]
    print(tables.cost_table(rows, costs), end="")
    if differing := tables.differing_costs(rows, costs):
        raise UserError("; ".join(differing))


def download(args: argparse.Namespace, zoo: Zoo) -> None:
    """Bring checkpoints into the torch hub cache."""
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
    """Measure the published figures with the published checkpoints."""
    rows = zoo.choose(args.rows, with_checkpoint=True)
    if launched_as()[2] > 1:
        raise UsageError("start this command once, without torchrun: --nproc N starts processes")
    if args.nproc < 1:
        raise UsageError(f"--nproc is {args.nproc} but should be at least 1")
    if args.batch_size is not None and args.batch_size < 1:
        raise UsageError(f"--batch-size is {args.batch_size} but should be at least 1")
    if not args.imagenet and not args.coco:
        raise UsageError("evaluate needs data: --imagenet FOLDER, --coco FOLDER or both")
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
        computes_on=init_distributed(args.device).device,
        flags={"classification": flags + of_classifiers, "detection": flags},
    )
    report = Report(check_writable(args.output), zoo)
    try:
        bad = evaluate_rows(rows, options, report)
    except KeyboardInterrupt:
        print(f"what is finished is kept in {args.output}: the same command goes on from there")
        raise
    print(f"report: {args.output / 'zoo.md'}, zoo.json and zoo.csv beside it")
    if bad:
        raise UserError(
            f"{len(bad)} of {len(rows)} rows failed or are outside of the tolerance: "
            f"{', '.join(bad)}"
        )


def readme(args: argparse.Namespace, zoo: Zoo) -> None:
    """Write the tables of published figures into README.md, or check them."""
    try:
        text = args.readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--readme {args.readme}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--readme {args.readme}: not a text file in UTF-8") from error
    fresh, found = tables.fill_in(text, zoo)
    if missing := {row.task for row in zoo.rows} - found:
        raise UserError(
            f"{args.readme} has no place for the table of {min(missing)}: the lines "
            f"'<!-- zoo: {min(missing)} -->' and '<!-- end of zoo -->'"
        )
    if args.check and fresh != text:
        raise UserError(f"{args.readme} is stale: run python -m scripts.zoo readme")
    if not args.check:
        with replacing(args.readme) as temporary:
            temporary.write_text(fresh, encoding="utf-8")


COMMANDS = {
    "list": list_rows,
    "table": table,
    "download": download,
    "evaluate": evaluate,
    "readme": readme,
}

if __name__ == "__main__":
    run(main, CheckpointError)
