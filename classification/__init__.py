"""DeiT with iRPE: models, trainer, evaluation. The import registers the models in timm."""

from classification.config import ClassificationConfig, parse_args
from classification.evaluate import evaluate
from classification.models import PUBLISHED, build_model

__all__ = ["PUBLISHED", "build_model", "ClassificationConfig", "parse_args", "evaluate"]
