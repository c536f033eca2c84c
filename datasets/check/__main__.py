"""Check a data set before training, with the flags of the trainers.

The exit code is 1 if training would stop or silently suffer, 2 for a mistake in a flag, else 0.
"""

import os
import sys

from datasets.check.command import main

if __name__ == "__main__":
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # As after `| head -1`: the rest of the text has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
