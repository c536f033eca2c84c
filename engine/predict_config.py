"""The options that every command for prediction has."""

from typing import Annotated, Literal

from pydantic import Field

from engine.config import Config
from engine.flags import POSITIONAL

__all__ = ["PredictConfig"]


class PredictConfig(Config):
    """Predict."""

    checkpoint: Annotated[str, POSITIONAL]
    """Path or URL of a checkpoint, or a .onnx or .pt2 file of scripts.export."""
    images: Annotated[tuple[str, ...], POSITIONAL]
    """Files, folders, patterns, archives (a.zip or a.zip/member) or URLs of images; the EXIF
    orientation is honored."""
    classes: str = ""
    """Text file with one class name per line, for a checkpoint without class names."""
    use_ema: bool | None = None
    """Predict with the EMA weights; none uses them if the checkpoint has them, as --eval does."""
    batch_size: int = Field(8, ge=1)
    """Number of images per batch."""
    num_workers: int = Field(4, ge=0)
    """Number of processes that read images."""
    device: str = "auto"
    """Device to run on: auto, cuda, cuda:N or cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of automatic mixed precision; auto is that of --eval."""
    force: bool = False
    """Overwrite existing output files."""
