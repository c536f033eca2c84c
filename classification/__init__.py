"""DeiT with iRPE: models, trainer, evaluation and prediction.

The import registers the models in timm.
"""

from classification.config import ClassificationConfig, parse_args
from classification.evaluate import evaluate
from classification.models import PUBLISHED, build_model
from classification.predictor import Classification, Classifier, load

__all__ = [
    "PUBLISHED",
    "build_model",
    "load",
    "Classifier",
    "Classification",
    "ClassificationConfig",
    "parse_args",
    "evaluate",
]
