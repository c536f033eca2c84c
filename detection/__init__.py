"""DETR with iRPE: model, matcher, losses, trainer, COCO evaluation and prediction."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.optional import require_own

if TYPE_CHECKING:
    from detection.build import build_model
    from detection.config import DetectionConfig, parse_args
    from detection.criterion import SetCriterion
    from detection.detections import Detections
    from detection.detr import DETR
    from detection.evaluation import evaluate
    from detection.matcher import HungarianMatcher
    from detection.postprocess import PostProcess, PostProcessSegm
    from detection.predictor import Detector, load

_MODULES = {
    "DetectionConfig": "config",
    "parse_args": "config",
    "DETR": "detr",
    "build_model": "build",
    "HungarianMatcher": "matcher",
    "SetCriterion": "criterion",
    "PostProcess": "postprocess",
    "PostProcessSegm": "postprocess",
    "evaluate": "evaluation",
    "load": "predictor",
    "Detector": "predictor",
    "Detections": "detections",
}

__all__ = [*_MODULES]

require_own("datasets", __name__)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `--help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return all names, also those that are not imported yet."""
    return sorted({*globals(), *_MODULES})
