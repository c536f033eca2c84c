"""Draw the iRPE of a trained model.

    python -m scripts.inspect outputs/checkpoint.pth
    python -m scripts.inspect outputs/checkpoint.pth --image photo.jpg --query 3 5

`buckets.png` shows the bucket of every key around a query, and `table_k.png` (`_q`, `_v`) the
learned tables of all layers. With an image, `attention.png` shows the attention of the query with
and without iRPE, and `attention_class_token.png` that of a classifier's class token.
"""

from collections.abc import Sequence
from typing import Annotated

from engine import Config, parse_config, run
from engine.flags import POSITIONAL

__all__ = ["InspectConfig", "main"]

_DESCRIPTION = """
Draw the iRPE of a trained model: buckets, learned tables and, with --image, attention with and
without iRPE. docs/inspect.md explains the pictures.
"""


class InspectConfig(Config):
    """Inspect."""

    checkpoint: Annotated[str, POSITIONAL]
    """Path or URL of a checkpoint, or the name of a published classifier."""
    image: str = ""
    """Path, archive member or URL of an image, to draw attention over it."""
    query: tuple[int, int] | None = None
    """Row and column of the query in tokens, from 0; none uses the center."""
    output_dir: str = ""
    """Folder for the pictures; empty uses the folder inspect next to the checkpoint."""
    model: str = ""
    """Name of the model, for a published checkpoint of a classifier."""
    enc_rpe2d: str = ""
    """Spec of the iRPE, for a published checkpoint of a detector."""
    use_ema: bool | None = None
    """Show the EMA weights; none uses them if the checkpoint has them, as --eval does."""
    force: bool = False
    """Overwrite existing pictures."""


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the pictures and print their paths."""
    config = parse_config(
        InspectConfig, argv, prog="python -m scripts.inspect", description=_DESCRIPTION
    )
    # Importing torch takes seconds, so `--help` and mistakes in flags come before.
    from scripts.inspect.pictures import draw

    draw(config)


if __name__ == "__main__":
    run(main)
