"""The parts of a run, from its configuration: weights, average, optimizer, schedule, step."""

import logging
import math
from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from detection.config import DetectionConfig
from engine.tensors import map_tensors
from irpe_core import load_checkpoint, load_weights

__all__ = [
    "load_start_weights",
    "create_ema",
    "param_groups",
    "create_schedule",
    "create_step_fn",
]

logger = logging.getLogger(__name__)

StepFn = Callable[[tuple[Tensor, Tensor, list[dict[str, Tensor]]]], dict[str, Tensor]]


def load_start_weights(config: DetectionConfig, model: nn.Module, checkpoint: dict | None) -> None:
    """Load what a run starts from: a checkpoint to go on from, or one to fine-tune.

    Training goes on only from a checkpoint that fits exactly. To fine-tune or to evaluate, weights
    of the same detector without iRPE do too: its tables then keep their initial values, which are
    random in DETR. So does a class head of another width in fine-tuning. All that is logged.

    Raises:
        CheckpointError: The weights cannot be read or do not fit.
    """
    if checkpoint is not None:
        load_weights(model, checkpoint["model"], may_lack_tables=config.eval)
    elif config.finetune:
        weights, own = dict(load_checkpoint(config.finetune)["model"]), model.state_dict()
        for key, value in own.items():
            if "class_embed" in key and key in weights and weights[key].shape != value.shape:
                logger.info("%s starts anew: %d classes now", key, len(value) - 1)
                weights[key] = value
        load_weights(model, weights, may_lack_tables=True)


def create_ema(
    config: DetectionConfig, model: nn.Module, checkpoint: dict | None
) -> ModelEmaV3 | None:
    """The moving average of the weights, from the checkpoint where it has one."""
    if not config.model_ema:
        return None
    ema = ModelEmaV3(model, decay=config.model_ema_decay)
    if checkpoint is not None and checkpoint.get("model_ema") is not None:
        load_weights(ema.module, checkpoint["model_ema"])
    return ema


def param_groups(config: DetectionConfig, model: nn.Module) -> list[dict]:
    """Two groups as in DETR: everything but the backbone, and the backbone at its own rate."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if "backbone" not in name], "lr": config.lr},
        {"params": [p for name, p in trained if "backbone" in name], "lr": config.lr_backbone},
    ]


def create_schedule(
    config: DetectionConfig, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[LRScheduler, bool]:
    """The schedule, and whether it moves with every optimizer step instead of every epoch.

    Args:
        config: `sched`, `lr_drop`, `warmup_steps`, `epochs`.
        optimizer: Whose rates are scheduled.
        steps: Optimizer steps of an epoch.
    """
    if config.sched == "step" and config.warmup_steps == 0:
        return StepLR(optimizer, config.lr_drop), False

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.sched == "step":
            return warmup * 0.1 ** (step // steps // config.lr_drop)
        begun = max(step - config.warmup_steps, 0) / max(
            config.epochs * steps - config.warmup_steps, 1
        )
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(begun, 1.0))))

    return LambdaLR(optimizer, factor), True


def create_step_fn(model: nn.Module, criterion: nn.Module) -> StepFn:
    """The step of the recipe: forward, match, weigh the losses. Losses are in float32."""

    def step(batch: tuple[Tensor, Tensor, list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        images, mask, targets = batch
        outputs = model(images, mask)
        with torch.autocast(images.device.type, enabled=False):
            losses = criterion(map_tensors(Tensor.float, outputs), targets)
            weights = criterion.weight_dict
            total = sum(losses[name] * weight for name, weight in weights.items() if name in losses)
        return {"loss": total, **losses}

    return step
