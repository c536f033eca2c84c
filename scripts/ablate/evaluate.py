"""Evaluate one trained model with several options, in one process.

    python -m scripts.ablate.evaluate TRAINER OPTIONS.yaml... [--device DEVICE]

The start of a process takes longer than an evaluation of small data. Each file of options is a
complete configuration of the trainer, with `eval`, `resume` and `output_dir`.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from engine import run
from engine.folder_lock import lock_folder
from engine.launcher import launched_as

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the evaluations one after the other."""
    parser = argparse.ArgumentParser(prog="python -m scripts.ablate.evaluate")
    parser.add_argument("trainer", choices=["classification", "detection"])
    parser.add_argument("options", nargs="+", type=Path, metavar="OPTIONS.yaml")
    parser.add_argument("--device", default="")
    args = parser.parse_args(argv)
    device = ["--device", args.device] if args.device else []
    trainer = import_module(f"{args.trainer}.main")
    with ExitStack() as stack:
        # A second command for the same cell waits for this process.
        lock = lock_folder(args.options[0].parents[1]) if launched_as()[0] == 0 else None
        if lock is not None:
            stack.enter_context(lock)
        for options in args.options:
            trainer.main(["--config", str(options), *device])


if __name__ == "__main__":
    run(main)
