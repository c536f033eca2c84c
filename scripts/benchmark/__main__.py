"""Run a benchmark.

    python -m scripts.benchmark train     training step and evaluation, with and without iRPE
    python -m scripts.benchmark ops       attention of every implementation, time and memory
    python -m scripts.benchmark data      reading images from a zip and from a folder
    python -m scripts.benchmark host      host time of a layer, with the launches left out

Each benchmark has its own options, for example `python -m scripts.benchmark train --help`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark that the first argument names, with the remaining arguments."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s {train,ops,data,host} [--option VALUE ...]",
    )
    parser.add_argument(
        "benchmark", choices=("train", "ops", "data", "host"), help="benchmark to run"
    )
    name = parser.parse_args(argv[:1]).benchmark
    importlib.import_module(f"scripts.benchmark.{name}").main(argv[1:])


if __name__ == "__main__":
    main()
