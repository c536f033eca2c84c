"""Evaluation of models in a session: metrics in the log and in `eval.json`, and details."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping

import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine.distributed import is_main
from engine.errors import UserError
from engine.report import Report, ReportWriter, write_pictures
from engine.session import Session

__all__ = ["Evaluate", "check_finite", "evaluate_models", "run_evaluation"]

logger = logging.getLogger(__name__)

Evaluate = Callable[[Mapping[str, nn.Module]], dict[str, float]]


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format metrics in one line."""
    return "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())


def run_evaluation(
    session: Session,
    model: nn.Module,
    evaluate: Evaluate,
    *,
    ema: ModelEmaV3 | None,
    num_images: int,
    describe: Callable[[Mapping[str, float]], str] = format_metrics,
    report: Callable[[], Report] | None = None,
) -> None:
    """Evaluate a model once; log its metrics and write them to `eval.json`.

    The details go to `metrics_per_class.json` and `metrics_per_class.png`, and the pictures to
    `images/`.

    Args:
        session: Session of the run.
        model: Model with its weights, on the session's device.
        evaluate: Function that returns the metrics, as in `Recipe`.
        ema: EMA of the weights; None for none.
        num_images: Number of images in the validation set.
        describe: Function that formats the metrics for the log.
        report: Function that returns the details, as in `Recipe`.

    Raises:
        UserError: A metric is not finite; no file is written.
    """
    if session.config.compile:
        model.compile()
    start = time.perf_counter()
    metrics = evaluate_models(evaluate, model, ema, session.device)
    check_finite(metrics)
    images_per_s = num_images / (time.perf_counter() - start)
    logger.info("%d images, %.4g images/s\n%s", num_images, images_per_s, describe(metrics))
    if session.output_dir is not None and is_main():
        record = {f"test_{name}": value for name, value in metrics.items()}
        record |= {"images": num_images, "images_per_s": images_per_s}
        (session.output_dir / "eval.json").write_text(json.dumps(record) + "\n")
        if report is not None:
            details = report()
            ReportWriter(session.output_dir).write(details)
            write_pictures(details, session.output_dir)


def evaluate_models(
    evaluate: Evaluate, model: nn.Module, ema: ModelEmaV3 | None, device: torch.device
) -> dict[str, float]:
    """Return the metrics of a model and its EMA, which may be on the CPU between evaluations."""
    models = {"": model}
    if ema is not None:
        models["ema_"] = ema.module.to(device)
    metrics = evaluate(models)
    if ema is not None and ema.device is not None:
        ema.module.to(ema.device)
    return metrics


def check_finite(metrics: Mapping[str, float]) -> None:
    """Raise UserError if a metric is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} must be finite, got {value}: the model gives outputs that are not finite, "
                "for example since --lr is too large, or the range of --dtype float16 too small"
            )
