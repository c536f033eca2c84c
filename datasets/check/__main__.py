"""Check a data set before training, with the flags of the trainers.

The exit code is 1 if training would stop or silently suffer, 2 for a mistake in a flag, else 0.
"""

import sys

from datasets.check.command import main

if __name__ == "__main__":
    sys.exit(main())
