"""The trainers of an ablation: their options, metrics, models and costs."""

from classification.config import ClassificationConfig
from classification.config import ModelConfig as ClassifierOptions
from detection.config import BackboneConfig, DetectionConfig, TransformerConfig
from engine import RunConfig

__all__ = [
    "TRAINERS",
    "build",
    "images_per_step",
    "lower_is_better",
    "metrics_of",
    "model_options",
    "without_weights",
]

TRAINERS: dict[str, type[RunConfig]] = {
    "classification": ClassificationConfig,
    "detection": DetectionConfig,
}
"""Class of the options of each trainer."""

_CLASSIFIER_METRICS = ("acc1", "acc5", "loss")
_DETECTOR_LOSSES = (
    *("loss", "loss_ce", "class_error", "loss_bbox", "loss_giou", "cardinality_error"),
)
_CLASSES = 1000


def metrics_of(config: RunConfig) -> list[str]:
    """Return the metrics of a line of log.txt; those with `test_` are also in eval.json."""
    if isinstance(config, ClassificationConfig):
        names = list(_CLASSIFIER_METRICS)
    else:
        from detection.coco_eval import METRICS

        names = [*_DETECTOR_LOSSES, *METRICS]
        names += [f"segm_{name}" for name in METRICS] if config.masks else []
    names += [f"ema_{name}" for name in names] if config.model_ema else []
    return [*(f"test_{name}" for name in names), "train_loss"]


def lower_is_better(metric: str) -> bool:
    """Return whether a smaller value of a metric is better."""
    return "loss" in metric or "error" in metric


def model_options(config: RunConfig) -> tuple:
    """Return the options of the model, equal for two configurations with the same model."""
    if isinstance(config, ClassificationConfig):
        names = [*ClassifierOptions.model_fields, "drop", "drop_path", "grad_checkpointing"]
    else:
        names = [*BackboneConfig.model_fields, *TransformerConfig.model_fields, "dropout"]
    return tuple(getattr(config, name) for name in names)


def without_weights(config: RunConfig) -> RunConfig:
    """Return the options of the same model with random weights."""
    own = {"pretrained": False, "finetune": ""}
    return config.model_copy(
        update={name: value for name, value in own.items() if name in type(config).model_fields}
    )


def build(config: RunConfig) -> None:
    """Build the model without its initial weights, to find options that do not fit it.

    Raises:
        UsageError: The options do not fit the model.
        ValueError: The options of a detector contradict each other.
    """
    if isinstance(config, ClassificationConfig):
        from classification.build import create_model

        create_model(without_weights(config), _CLASSES)
    else:
        from detection.build import build_network

        build_network(config, load=False)


def images_per_step(config: RunConfig) -> int:
    """Return the number of images per optimizer step and process."""
    return config.batch_size * config.accumulate_steps
