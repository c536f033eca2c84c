"""Functions that build the parts of a training recipe from the configuration."""

from collections.abc import Callable, Mapping
from functools import partial

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from classification.config import ClassificationConfig
from classification.data import eval_loader
from classification.evaluation import evaluate
from classification.finetune import adapt_positions, adapt_weights, recorded_image_size
from classification.losses import DistillationLoss, base_criterion
from classification.models import build_model
from classification.report import ClassReport
from datasets import ResilientDataset, apply_operations, erase, normalize_pixels
from datasets.device_augment import Operation
from datasets.pixels import Erasing
from engine import Evaluate, UsageError, resolve_dtype
from irpe_core import CheckpointError, load_checkpoint, load_weights

__all__ = [
    "autocast_dtype",
    "create_ema",
    "create_evaluation",
    "create_model",
    "create_optimizer",
    "create_schedule",
    "create_step",
    "scaled_lr",
]

Batch = tuple[Tensor, Tensor, list[list[Erasing]], list[list[Operation]]]


def create_model(
    config: ClassificationConfig, num_classes: int, checkpoint: Mapping | None = None
) -> nn.Module:
    """Build the model with its initial weights.

    Training resumes only from a checkpoint that fits exactly. Fine-tuning and evaluation also
    accept weights of another image size, whose learned position embedding is resampled, and weights
    of the same model without iRPE: the tables then keep their initial value, zero. Both are logged.

    Args:
        config: The configuration.
        num_classes: Number of classes.
        checkpoint: Checkpoint to resume or to evaluate; None uses `pretrained`, `finetune` or
            random weights.

    Raises:
        UsageError: The options do not fit the model.
        CheckpointError: The weights do not fit the model.
    """
    torch.manual_seed(config.seed)
    shape = {
        name: getattr(config, name)
        for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    }
    try:
        model = build_model(
            config.model,
            num_classes=num_classes,
            input_size=config.image_size,
            pretrained=config.pretrained,
            rpe=config.rpe,
            abs_pos_embed=config.abs_pos_embed,
            distillation_token=config.distillation_token,
            drop_rate=config.drop,
            proj_drop_rate=config.drop,
            drop_path_rate=config.drop_path,
            **{name: value for name, value in shape.items() if value is not None},
        )
        model.set_grad_checkpointing(config.grad_checkpointing)
    except CheckpointError:
        raise
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UsageError(
            f"model {config.model!r} cannot be built with these options: {error}"
        ) from error
    if checkpoint is not None:
        weights = _fitting(config, model, checkpoint["model"], checkpoint)
        load_weights(model, weights, may_lack_tables=config.eval)
    elif config.finetune:
        source = load_checkpoint(config.finetune)
        weights = adapt_weights(
            source["model"], model, recorded_image_size(source, config.finetune)
        )
        load_weights(model, weights, may_lack_tables=True)
    if config.distillation_type != "none":
        model.set_distilled_training(True)
    return model


def create_ema(
    config: ClassificationConfig, model: nn.Module, checkpoint: Mapping | None
) -> ModelEmaV3 | None:
    """Create the EMA of the weights, with the values of the checkpoint if it has an EMA.

    Returns:
        The EMA. None without `model_ema`. For an evaluation, None if the checkpoint has no EMA.
    """
    weights = (checkpoint or {}).get("model_ema")
    wanted = weights is not None if config.eval else config.model_ema
    if not wanted:
        return None
    device = "cpu" if config.model_ema_force_cpu else None
    ema = ModelEmaV3(
        model,
        decay=config.model_ema_decay,
        use_warmup=config.model_ema_warmup,
        device=device,
    )
    if weights is not None:
        weights = _fitting(config, model, weights, checkpoint)
        load_weights(ema.module, weights, may_lack_tables=config.eval)
    return ema


def _fitting(
    config: ClassificationConfig,
    model: nn.Module,
    weights: dict[str, Tensor],
    checkpoint: Mapping,
) -> dict[str, Tensor]:
    """Return weights of a checkpoint, for an evaluation with positions of the model's grid."""
    if not config.eval:
        return weights
    return adapt_positions(weights, model, recorded_image_size(checkpoint, config.resume))


def autocast_dtype(config: ClassificationConfig, device: torch.device) -> torch.dtype:
    """Return the data type of mixed precision; DeiT was trained in float16 on GPUs."""
    auto = torch.float16 if device.type == "cuda" else torch.float32
    return resolve_dtype(config.dtype, auto=auto)


def scaled_lr(config: ClassificationConfig, total_batch_size: int) -> float:
    """Return the learning rate for a total batch size; `lr` is for 512."""
    return config.lr * total_batch_size / 512 if config.scale_lr else config.lr


def create_optimizer(
    config: ClassificationConfig, model: nn.Module, total_batch_size: int
) -> torch.optim.Optimizer:
    """Create the optimizer of timm, with its parameter groups for `layer_decay`.

    Weight decay does not apply to biases, norms, position embedding and tokens.

    Raises:
        UsageError: The optimizer cannot run here, or not with these options.
    """
    options = optimizer_kwargs(config) | {"lr": scaled_lr(config, total_batch_size)}
    if config.opt in ("adam", "adamw"):
        options["fused"] = True
    try:
        optimizer = create_optimizer_v2(model, **options)
    except (ArithmeticError, AssertionError, ImportError, RuntimeError, TypeError, ValueError) as e:
        raise UsageError(f"--opt {config.opt} cannot be used with these options: {e}") from e
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(
            f"--opt must be an optimizer without second derivatives, got {config.opt!r}"
        )
    return optimizer


def create_schedule(config: ClassificationConfig, optimizer: torch.optim.Optimizer) -> Scheduler:
    """Create the learning rate schedule of timm.

    Raises:
        UsageError: The schedule does not accept these options.
    """
    try:
        scheduler, _ = create_scheduler(config, optimizer)
    except (ArithmeticError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            f"--sched {config.sched} cannot be used with these options: {error}"
        ) from error
    return scheduler


def create_evaluation(
    config: ClassificationConfig,
    data: ResilientDataset,
    device: torch.device,
    *,
    report: ClassReport | None = None,
    batches: int | None = None,
) -> Evaluate:
    """Create the function that evaluates several models on a validation set.

    Args:
        config: The configuration.
        data: The validation set.
        device: Device of the models.
        report: Collects the details of each evaluation.
        batches: Number of batches to evaluate in each process; None evaluates all.
    """
    return partial(
        evaluate,
        loader=eval_loader(data, config, device, batches),
        device=device,
        dtype=autocast_dtype(config, device),
        shared=config.dist_eval,
        report=report,
    )


def create_step(
    config: ClassificationConfig, num_classes: int, device: torch.device
) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """Create the training step: augmentation on the device, forward pass, loss."""
    mixup = None
    if config.mixes:
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            cutmix_minmax=config.cutmix_minmax,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )
    base = base_criterion(mixed=mixup is not None, smoothing=config.smoothing)
    criterion = DistillationLoss(
        base,
        _create_teacher(config, num_classes, device),
        config.distillation_type,
        config.distillation_alpha,
        config.distillation_tau,
    )

    def step(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, targets, erasings, operations = batch
        images = normalize_pixels(apply_operations(images, operations))
        images = erase(images, erasings, config.remode)
        if mixup is not None:
            images, targets = mixup(images, targets)
        return {"loss": criterion(images, model(images), targets)}

    return step


def _create_teacher(
    config: ClassificationConfig, num_classes: int, device: torch.device
) -> nn.Module | None:
    """Create the frozen teacher of a distillation; None without distillation."""
    if config.distillation_type == "none":
        return None
    teacher = timm.create_model(config.teacher_model, num_classes=num_classes)
    load_weights(teacher, load_checkpoint(config.teacher_path)["model"])
    return teacher.to(device).requires_grad_(False)
