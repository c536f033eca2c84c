"""Detect objects with a trained model: `python -m detection.predict CHECKPOINT IMAGES...`.

The checkpoint gives model, classes, image size and transform. A published file does not: add its
`--enc_rpe2d`. Without `--output_dir` and `--json` the objects are printed, one image per line.
"""

from collections.abc import Sequence

from pydantic import Field, field_validator

from detection.config import BackboneConfig, TransformerConfig
from engine import parse_config, run
from engine.predict_config import PredictConfig

__all__ = ["DetectorPredict", "main"]


class DetectorPredict(PredictConfig, BackboneConfig, TransformerConfig):
    """Detect objects with a trained model; options of the model override the checkpoint."""

    threshold: float = Field(0.5, ge=0, le=1)
    """Smallest score of an object; 0 for a JSON file to evaluate."""
    output_dir: str = ""
    """Folder for copies of the images with boxes, masks, class names and scores; images with sides
    below 300 pixels are enlarged."""
    json_: str = ""
    """Output file of the boxes in COCO's format of results; masks go to a second file, whose name
    ends in _segm.json."""
    annotations: str = ""
    """Annotation file in COCO's format that gives the image ids; without it the ids are the numbers
    in the file names, or 1, 2, 3, ... if some name is not a number."""
    image_size: int | None = Field(None, ge=1)
    """Short side of the images in pixels; none uses that of the checkpoint."""

    @field_validator("json_")
    @classmethod
    def _check_json(cls, path: str) -> str:
        """Refuse a file name of another format."""
        if path and not path.endswith(".json"):
            raise ValueError("must end in .json")
        return path


def main(argv: Sequence[str] | None = None) -> None:
    """Detect objects in the images that the words name."""
    config = parse_config(DetectorPredict, argv, prog="detection.predict", description=__doc__)
    # Importing torch takes seconds, so `--help` and mistakes in flags come before.
    from detection.prediction import predict

    predict(config)


if __name__ == "__main__":
    run(main)
