"""Export a trained model: `python -m scripts.export --help`."""

from engine import run
from irpe_core import CheckpointError
from scripts.export.models import main

if __name__ == "__main__":
    run(main, CheckpointError)
