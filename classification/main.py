"""Train and evaluate DeiT with iRPE. `python -m classification.main --help` lists the options."""

from classification.config import parse_args
from engine import run

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Train, or evaluate with `--eval`.

    Args:
        argv: Flags; None for those of the process.
    """
    config = parse_args(argv)
    # Importing torch takes seconds, so `--help` and mistakes in flags come before.
    from classification.training import start

    start(config)


if __name__ == "__main__":
    run(main)
