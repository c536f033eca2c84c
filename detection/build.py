"""Functions that build the model and the parts of a training recipe from the configuration.

`build_network` and `build_model` need only the configuration. The `create_*` functions build the
parts of a recipe, with initial weights.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from datasets import ResilientDataset, normalize_batch
from detection.backbone import build_backbone
from detection.coco_eval import CocoEvaluator
from detection.config import DetectionConfig
from detection.criterion import SetCriterion
from detection.data import eval_loader
from detection.detr import DETR
from detection.evaluation import evaluate
from detection.matcher import HungarianMatcher
from detection.position_encoding import build_position_encoding
from detection.postprocess import PostProcess, PostProcessSegm
from detection.report import DetectionReport
from detection.segmentation import DETRSegmentation
from detection.transformer import Transformer
from engine import Evaluate, UsageError, resolve_dtype
from engine.tensors import copy_from_host, map_tensors
from irpe_core import CheckpointError, load_checkpoint, load_weights, parse_rpe_spec

__all__ = [
    "COCO_CLASSES",
    "autocast_dtype",
    "build_model",
    "build_network",
    "create_detector",
    "create_ema",
    "create_evaluation",
    "create_optimizer",
    "create_schedule",
    "create_step",
    "param_groups",
]

logger = logging.getLogger(__name__)

# COCO has 80 classes, with category ids up to 90.
COCO_CLASSES = 91

Batch = tuple[Tensor, Tensor, list[dict[str, Tensor]]]


def build_network(config: DetectionConfig, *, load: bool = True) -> nn.Module:
    """Build the network: `DETR`, or `DETRSegmentation` with `masks`.

    Args:
        config: The configuration.
        load: Load the weights of the backbone and of `frozen_weights`. False keeps them random, for
            a network that gets its weights from a checkpoint.

    Raises:
        ValueError: The options contradict each other.
        CheckpointError: Weights cannot be read or do not fit.
    """
    detr = DETR(
        build_backbone(config, load=load),
        build_position_encoding(config.position_embedding, config.hidden_dim),
        Transformer(
            config.hidden_dim,
            config.nheads,
            config.enc_layers,
            config.dec_layers,
            config.dim_feedforward,
            config.dropout,
            pre_norm=config.pre_norm,
            rpe=parse_rpe_spec(config.enc_rpe2d),
        ),
        _num_classes(config),
        config.num_queries,
        config.aux_loss,
    )
    if not config.masks:
        return detr
    if config.frozen_weights and load:
        load_weights(detr, load_checkpoint(config.frozen_weights)["model"])
    return DETRSegmentation(detr, freeze_detr=bool(config.frozen_weights))


def build_model(
    config: DetectionConfig, *, load: bool = True
) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Build the network, its losses and its post-processing, on the CPU.

    Args:
        config: The configuration.
        load: See `build_network`.

    Returns:
        The model, the criterion and the post-processors: `bbox`, and with masks also `segm`.

    Raises:
        ValueError: The options contradict each other.
        CheckpointError: Weights cannot be read or do not fit.
    """
    matcher = HungarianMatcher(config.set_cost_class, config.set_cost_bbox, config.set_cost_giou)
    weights = {
        "loss_ce": config.cls_loss_coef,
        "loss_bbox": config.bbox_loss_coef,
        "loss_giou": config.giou_loss_coef,
    }
    losses = ["labels", "boxes", "cardinality"]
    postprocessors: dict[str, nn.Module] = {"bbox": PostProcess()}
    if config.masks:
        weights |= {"loss_mask": config.mask_loss_coef, "loss_dice": config.dice_loss_coef}
        losses.append("masks")
        postprocessors["segm"] = PostProcessSegm()
    if config.aux_loss:
        weights |= {
            f"{name}_{layer}": weight
            for layer in range(config.dec_layers - 1)
            for name, weight in weights.items()
        }
    criterion = SetCriterion(_num_classes(config), matcher, weights, config.eos_coef, losses)
    return build_network(config, load=load), criterion, postprocessors


def _num_classes(config: DetectionConfig) -> int:
    """Return the number of classes without no-object; that of COCO by default."""
    return COCO_CLASSES if config.num_classes is None else config.num_classes


def create_detector(
    config: DetectionConfig, num_classes: int, checkpoint: Mapping | None, device: torch.device
) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Build the model with its initial weights, its losses and its post-processing.

    Training resumes only from a checkpoint that fits exactly. Fine-tuning and evaluation also
    accept weights of the same model without iRPE: the tables then keep their initial values, which
    are random in DETR. Fine-tuning replaces a class head with another number of classes. Both are
    logged.

    Args:
        config: The configuration.
        num_classes: Number of classes of the data, used if the option `num_classes` is none.
        checkpoint: Checkpoint to resume or to evaluate; None uses `finetune`, or
            else `backbone_weights`, `frozen_weights` and random weights.
        device: Device of the model, the losses and the post-processing.

    Raises:
        UsageError: The options contradict each other or the data.
        CheckpointError: Weights cannot be read or do not fit.
    """
    torch.manual_seed(config.seed)
    if config.num_classes is None:
        config = config.model_copy(update={"num_classes": num_classes})
    if config.num_classes < num_classes:
        raise UsageError(
            f"--num-classes must be at least {num_classes}, since the data has labels up to "
            f"{num_classes - 1}, got {config.num_classes}"
        )
    load = checkpoint is None and not config.finetune
    try:
        model, criterion, postprocessors = build_model(config, load=load)
    except CheckpointError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    if checkpoint is not None:
        load_weights(model, checkpoint["model"], may_lack_tables=config.eval)
    elif config.finetune:
        _load_to_finetune(model, config.finetune)
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model.to(device), criterion.to(device), postprocessors


def _load_to_finetune(model: nn.Module, source: str) -> None:
    """Load weights, except those of a class head with another number of classes."""
    weights = dict(load_checkpoint(source)["model"])
    for key, value in model.state_dict().items():
        if "class_embed" in key and key in weights and weights[key].shape != value.shape:
            logger.info("%s has new random weights for %d classes", key, len(value) - 1)
            weights[key] = value
    load_weights(model, weights, may_lack_tables=True)


def create_ema(
    config: DetectionConfig, model: nn.Module, checkpoint: Mapping | None
) -> ModelEmaV3 | None:
    """Create the EMA of the weights, with the values of the checkpoint if it has an EMA.

    Returns:
        The EMA. None for a training without `model_ema`, and for the evaluation of a checkpoint
        without EMA.
    """
    weights = (checkpoint or {}).get("model_ema")
    enabled = weights is not None if config.eval else config.model_ema
    if not enabled:
        return None
    ema = ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    if weights is not None:
        load_weights(ema.module, weights, may_lack_tables=config.eval)
    return ema


def autocast_dtype(config: DetectionConfig) -> torch.dtype:
    """Return the data type of mixed precision; DETR was trained in float32."""
    return resolve_dtype(config.dtype, auto=torch.float32)


def param_groups(config: DetectionConfig, model: nn.Module) -> list[dict]:
    """Return DETR's two parameter groups: the backbone, with its learning rate, comes second."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if "backbone" not in name], "lr": config.lr},
        {"params": [p for name, p in trained if "backbone" in name], "lr": config.lr_backbone},
    ]


def create_optimizer(config: DetectionConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create AdamW with DETR's two parameter groups."""
    groups = param_groups(config, model)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def create_schedule(
    config: DetectionConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> tuple[LRScheduler, bool]:
    """Create the schedule of the learning rates.

    Args:
        config: The configuration.
        optimizer: The optimizer.
        steps_per_epoch: Number of optimizer steps per epoch.

    Returns:
        The scheduler, and True if it counts optimizer steps, False if it counts epochs.
    """
    if config.sched == "step" and config.warmup_steps == 0:
        return StepLR(optimizer, config.lr_drop), False

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.sched == "step":
            return warmup * 0.1 ** (step // steps_per_epoch // config.lr_drop)
        progress = max(step - config.warmup_steps, 0) / max(
            config.epochs * steps_per_epoch - config.warmup_steps, 1
        )
        return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))

    return LambdaLR(optimizer, factor), True


def create_step(criterion: SetCriterion) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """Create the training step: forward pass of the normalized images, then losses in float32."""

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, mask, targets = batch
        images = normalize_batch(images, mask)
        outputs = model(images, mask)
        with torch.autocast(images.device.type, enabled=False):
            losses = criterion(map_tensors(Tensor.float, outputs), targets)
            weights = {n: weight for n, weight in criterion.weight_dict.items() if n in losses}
            factors = copy_from_host(torch.tensor(list(weights.values())), images.device)
            total = (torch.stack([losses[name] for name in weights]) * factors).sum()
        return {"loss": total, **losses}

    return step


def create_evaluation(
    config: DetectionConfig,
    criterion: SetCriterion,
    postprocessors: dict[str, nn.Module],
    data: ResilientDataset,
    device: torch.device,
    *,
    report: DetectionReport | None = None,
    batches: int | None = None,
) -> Evaluate:
    """Create the function that evaluates several models on a validation set.

    Args:
        config: The configuration.
        criterion: The losses.
        postprocessors: `bbox`, and for masks also `segm`.
        data: The validation set.
        device: Device of the models.
        report: Collects the details of each evaluation.
        batches: Number of batches to evaluate in each process; None evaluates all.
    """
    loader = eval_loader(data, config, device, batches)
    iou_types = ("bbox", "segm") if config.masks else ("bbox",)

    @cache
    def shared_evaluator() -> CocoEvaluator:
        return CocoEvaluator(
            data.dataset.coco,
            iou_types,
            data.dataset.label_to_category,
            partial=batches is not None,
        )

    def evaluate_models(models: Mapping[str, nn.Module]) -> dict[str, float]:
        evaluator = shared_evaluator()
        if report is not None:
            report.reset()
        metrics = {}
        for prefix, model in models.items():
            model_metrics = evaluate(
                model,
                criterion,
                postprocessors,
                loader,
                evaluator,
                device,
                autocast_dtype(config),
                pad_to_batch=config.eval_padding,
                on_images=report.add_images if report is not None and not prefix else None,
            )
            if report is not None:
                report.add_metrics(prefix, evaluator.per_class)
            metrics |= {f"{prefix}{name}": value for name, value in model_metrics.items()}
        return metrics

    return evaluate_models
