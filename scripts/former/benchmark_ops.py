"""Former name of `python -m scripts.benchmark ops`."""

import sys

from scripts.benchmark.__main__ import main

if __name__ == "__main__":
    message = "scripts.benchmark_ops is now `python -m scripts.benchmark ops`"
    print(f"warning: {message}", file=sys.stderr)
    main(["ops", *sys.argv[1:]])
