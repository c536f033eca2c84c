"""Draw the predictions of the quickstart's detector, print its metrics and check them.

    python -m scripts.quickstart.detection OUTPUT_DIR

Reads the run in OUTPUT_DIR/detection and its evaluation in OUTPUT_DIR/detection_evaluation. Writes
`predictions.png` and `curves.png` into the folder of the run. The exit code is 1 if AP50 is too low
or the evaluation differs from the training.
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from detection.build import build_model
from detection.coco_eval import format_metrics
from detection.config import parse_args
from detection.data import build_split
from irpe_core import load_checkpoint, load_weights
from scripts.plot import draw as draw_curves
from scripts.plot import read_log

__all__ = ["main"]

MIN_AP50 = 0.60
MIN_SCORE = 0.5
SCENES = 8


def draw(axes: Axes, image: Tensor, boxes: Tensor, names: list[str], title: str) -> None:
    """Draw an image `(3, height, width)` in [0, 1] with boxes `(n, 4)`, x0 y0 x1 y1 in pixels."""
    axes.imshow(image.permute(1, 2, 0))
    for (x0, y0, x1, y1), name in zip(boxes.tolist(), names, strict=True):
        axes.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="yellow"))
        axes.text(x0, y0 - 1, name, color="yellow", fontsize=7)
    axes.set_title(title, fontsize=8)
    axes.axis("off")


def draw_predictions(run: Path, path: Path) -> None:
    """Draw scenes of the validation set: ground truth above, predictions below."""
    checkpoint = load_checkpoint(run / "checkpoint.pth")
    config = parse_args(["--config", str(run / "config.yaml")])
    data = build_split(config, "val", checkpoint["label_to_category"]).dataset
    config = config.model_copy(update={"num_classes": data.num_classes})
    model, _, postprocessors = build_model(config, load=False)
    load_weights(model, checkpoint["model"])
    model.eval()
    data.transforms, transform = None, data.transforms
    figure, axes = plt.subplots(2, SCENES, figsize=(2 * SCENES, 4.4), layout="constrained")
    for i in range(SCENES):
        image, truth = data[i]
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) / 255
        pixels = pixels.reshape(image.height, image.width, 3).permute(2, 0, 1)
        labels = [data.classes[label] for label in truth["labels"].tolist()]
        draw(axes[0, i], pixels, truth["boxes"], labels, "ground truth" if i == 0 else "")
        with torch.inference_mode():
            outputs = model(transform.transform_image(image)[None])
        (found,) = postprocessors["bbox"](outputs, torch.tensor([[image.height, image.width]]))
        kept = found["scores"] > MIN_SCORE
        scored = zip(found["labels"][kept].tolist(), found["scores"][kept].tolist(), strict=True)
        names = [f"{data.classes[label]} {score:.2f}" for label, score in scored]
        draw(axes[1, i], pixels, found["boxes"][kept], names, "predicted" if i == 0 else "")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder: Path) -> int:
    """Draw and print the results and failed checks, and return the exit code."""
    mpl.use("Agg")
    run = folder / "detection"
    lines = read_log(run)
    evaluated = json.loads((folder / "detection_evaluation" / "eval.json").read_text())
    evaluated = {name: value for name, value in evaluated.items() if name.startswith("test_")}
    draw_predictions(run, run / "predictions.png")
    draw_curves({"detection": lines}, run / "curves.png")
    metrics = {name.removeprefix("test_"): value for name, value in evaluated.items()}
    print(f"\ndetection, 200 validation scenes after {len(lines)} epochs")
    print(format_metrics(metrics))
    print(f"pictures: {run / 'predictions.png'}, {run / 'curves.png'}")
    failures = []
    if metrics["AP50"] < MIN_AP50:
        failures.append(f"AP50 must be at least {MIN_AP50}, got {metrics['AP50']:.3f}")
    different = [name for name in evaluated if evaluated[name] != lines[-1][name]]
    if different:
        failures.append(
            f"metrics of --eval must be those of training: {', '.join(different)} differ"
        )
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
