"""DETR with iRPE: model, matcher, losses, trainer and COCO evaluation, on plain tensors."""

from detection.build import build_model
from detection.config import DetectionConfig, parse_args
from detection.criterion import SetCriterion
from detection.detr import DETR
from detection.evaluate import evaluate
from detection.matcher import HungarianMatcher
from detection.postprocess import PostProcess, PostProcessSegm

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
]
