"""Command `python -m scripts.benchmark.gpu`."""

import sys

from scripts.benchmark.gpu import main

if __name__ == "__main__":
    sys.exit(main())
