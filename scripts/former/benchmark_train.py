"""Former name of `python -m scripts.benchmark train`."""

import sys

from scripts.benchmark.__main__ import main

if __name__ == "__main__":
    message = "scripts.benchmark_train is now `python -m scripts.benchmark train`"
    print(f"warning: {message}", file=sys.stderr)
    main(["train", *sys.argv[1:]])
