"""Former name of `python -m scripts.benchmark data`."""

import sys

from scripts.benchmark.__main__ import main

if __name__ == "__main__":
    message = "scripts.benchmark_data is now `python -m scripts.benchmark data`"
    print(f"warning: {message}", file=sys.stderr)
    main(["data", *sys.argv[1:]])
