"""The predictions of `classification.predict`, which imports this after its flags."""

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from classification.config import ModelConfig
from classification.predictor import Classification, load
from datasets.image_files import ImageFiles, find_images
from engine.prediction import (
    check_outputs,
    predict_files,
    printable,
    require_all,
    start_prediction,
    write_output,
)

if TYPE_CHECKING:
    from classification.predict import ClassifierPredict

__all__ = ["predict"]


def predict(config: "ClassifierPredict") -> None:
    """Classify the images that the options name."""
    start_prediction()
    output = Path(config.output) if config.output else None
    check_outputs([output] if output else [], force=config.force)
    files = find_images(config.images)
    given = config.model_fields_set & ModelConfig.model_fields.keys()
    classifier = load(
        config.checkpoint,
        classes=config.classes,
        use_ema=config.use_ema,
        device=config.device,
        dtype=config.dtype,
        **{name: getattr(config, name) for name in given},
    )
    found: dict[str, Classification] = {}

    def predict_batch(batch: list[tuple[int, Any]]) -> None:
        images = torch.stack([image for _, image in batch])
        results = classifier.predict(images, config.topk)
        for (index, _), result in zip(batch, results, strict=True):
            found[files[index].name] = result
            if output is None:
                print(_line(files[index].name, result))

    images = ImageFiles([file.name for file in files], classifier.transform)
    bad = predict_files(images, predict_batch, config)
    if output is not None:
        write_output(output, (_csv if output.suffix == ".csv" else _json)(found))
    require_all(bad, len(files))


def _line(name: str, result: Classification) -> str:
    """Return the classes of an image in one line."""
    scores = zip(result.classes, result.scores.tolist(), strict=True)
    return f"{printable(name)}: " + ", ".join(f"{label} {score:.4f}" for label, score in scores)


def _rows(result: Classification) -> list[dict[str, Any]]:
    """Return the classes of an image, most probable first."""
    columns = (result.labels.tolist(), result.classes, result.scores.tolist())
    return [
        {"label": label, "class": name, "score": score}
        for label, name, score in zip(*columns, strict=True)
    ]


def _json(found: dict[str, Classification]) -> str:
    """Return all results as JSON: a list with the image and its predictions."""
    images = [{"image": name, "predictions": _rows(result)} for name, result in found.items()]
    return json.dumps(images, ensure_ascii=False, indent=1) + "\n"


def _csv(found: dict[str, Classification]) -> str:
    """Return all results as CSV: a line for each image and rank."""
    text = io.StringIO()
    table = csv.DictWriter(text, ["image", "rank", "label", "class", "score"])
    table.writeheader()
    for name, result in found.items():
        for rank, row in enumerate(_rows(result), 1):
            table.writerow({"image": name, "rank": rank, **row})
    return text.getvalue()
