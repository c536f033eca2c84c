"""Run a benchmark.

    python -m scripts.benchmark train     training step and evaluation, with and without iRPE
    python -m scripts.benchmark ops       attention of every implementation, time and memory
    python -m scripts.benchmark data      reading images, and the loaders of training
    python -m scripts.benchmark coco      start of a detection training and COCO metrics
    python -m scripts.benchmark checkpoint  checkpoints and the start of a training
    python -m scripts.benchmark memory    memory of a recipe, a lower bound computed without a GPU
    python -m scripts.benchmark host      host time of a layer, with the launches left out
    python -m scripts.benchmark gpu       everything that needs a GPU: correctness, speed, training
    python -m scripts.benchmark static    estimates of the Triton kernels, without a GPU

Each benchmark has its own options, for example `python -m scripts.benchmark train --help`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = ("train", "ops", "data", "coco", "checkpoint", "memory", "host", "gpu", "static")


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the benchmark that the first argument names, and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s {{{','.join(BENCHMARKS)}}} [--option VALUE ...]",
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, help="benchmark to run")
    name = parser.parse_args(argv[:1]).benchmark
    return importlib.import_module(f"scripts.benchmark.{name}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
