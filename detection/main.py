"""Train and evaluate DETR with iRPE. `python -m detection.main --help` lists the options."""

from detection.config import parse_args
from engine import run

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Train, or evaluate with `--eval`.

    Args:
        argv: Flags; None for those of the process.
    """
    config = parse_args(argv)
    # Importing torch takes seconds, so `--help` and mistakes in flags come before.
    from detection.training import start

    start(config)


if __name__ == "__main__":
    run(main)
