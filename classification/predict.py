"""Classify images with a trained model: `python -m classification.predict CHECKPOINT IMAGES...`.

The checkpoint gives model, classes, image size and transform. A published file does not: add its
`--model`. Without `--output` the classes are printed, one image per line.
"""

from collections.abc import Sequence

from pydantic import Field, field_validator

from classification.config import ModelConfig
from engine import parse_config, run
from engine.predict_config import PredictConfig

__all__ = ["ClassifierPredict", "main"]


class ClassifierPredict(PredictConfig, ModelConfig):
    """Classify images with a trained model; options of the model override the checkpoint."""

    topk: int = Field(5, ge=1)
    """Number of classes per image."""
    output: str = ""
    """Output file, ending in .csv or .json; empty prints the classes."""

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: str) -> str:
        """Refuse a file name of another format."""
        if output and not output.endswith((".csv", ".json")):
            raise ValueError("must end in .csv or .json")
        return output


def main(argv: Sequence[str] | None = None) -> None:
    """Classify the images that the words name."""
    config = parse_config(
        ClassifierPredict, argv, prog="classification.predict", description=__doc__
    )
    # Importing torch takes seconds, so `--help` and mistakes in flags come before.
    from classification.prediction import predict

    predict(config)


if __name__ == "__main__":
    run(main)
