"""DETR with iRPE: model, matcher, losses, trainer, COCO evaluation and prediction."""

from detection.build import build_model
from detection.config import DetectionConfig, parse_args
from detection.criterion import SetCriterion
from detection.detr import DETR
from detection.evaluate import evaluate
from detection.matcher import HungarianMatcher
from detection.postprocess import PostProcess, PostProcessSegm
from detection.predictor import Detections, Detector, load

__all__ = [
    "DetectionConfig",
    "parse_args",
    "DETR",
    "build_model",
    "HungarianMatcher",
    "SetCriterion",
    "PostProcess",
    "PostProcessSegm",
    "evaluate",
    "load",
    "Detector",
    "Detections",
]
