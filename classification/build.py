"""The parts of a run, from its configuration: model, average, optimizer, step."""

from collections.abc import Callable

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from classification.config import ClassificationConfig
from classification.finetune import adapt_weights
from classification.losses import DistillationLoss, base_criterion
from classification.models import build_model
from engine import UsageError
from irpe_core import CheckpointError, load_checkpoint, load_weights

__all__ = ["create_model", "create_ema", "scaled_lr", "create_optimizer", "create_step_fn"]


def create_model(
    config: ClassificationConfig, num_classes: int, checkpoint: dict | None = None
) -> nn.Module:
    """The model of a configuration, with the weights that it starts from.

    Training goes on from `checkpoint` only if it fits exactly. To fine-tune or to evaluate, weights
    of the same model without iRPE do too: its tables then keep their initial values, zero, and that
    is logged.

    Args:
        config: The configuration.
        num_classes: Width of the head.
        checkpoint: What to resume or evaluate; None for `pretrained`, `finetune` or fresh weights.

    Raises:
        UsageError: Options that do not go with the model.
        CheckpointError: Weights that do not fit it.
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
    except CheckpointError:
        raise
    except (ValueError, TypeError, AssertionError) as error:
        raise UsageError(f"model {config.model!r} cannot be built so: {error}") from error
    if checkpoint is not None:
        load_weights(model, checkpoint["model"], may_lack_tables=config.eval)
    elif config.finetune:
        source = load_checkpoint(config.finetune)
        weights = adapt_weights(source["model"], model, _image_size(source, config.finetune))
        load_weights(model, weights, may_lack_tables=True)
    if config.distillation_type != "none":
        model.set_distilled_training(True)
    return model


def _image_size(checkpoint: dict, source: str) -> tuple[int, int] | None:
    """Height and width in pixels that a checkpoint was trained at, if it says so."""
    size = (checkpoint.get("args") or {}).get("input_size")
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise CheckpointError(
            f"args of {source}: input_size is {size!r}: pixels, or height and width, are needed"
        )
    return pair


def create_ema(
    config: ClassificationConfig, model: nn.Module, checkpoint: dict | None
) -> ModelEmaV3 | None:
    """The moving average of the weights, from the checkpoint where it has one."""
    if not config.model_ema:
        return None
    device = "cpu" if config.model_ema_force_cpu else None
    ema = ModelEmaV3(model, decay=config.model_ema_decay, device=device)
    if checkpoint is not None and checkpoint.get("model_ema") is not None:
        load_weights(ema.module, checkpoint["model_ema"], may_lack_tables=config.eval)
    return ema


def scaled_lr(config: ClassificationConfig, world_size: int) -> float:
    """The learning rate for the images of a step: `lr` is for 512."""
    if not config.scale_lr:
        return config.lr
    return config.lr * config.batch_size * config.accumulate_steps * world_size / 512


def create_optimizer(
    config: ClassificationConfig, model: nn.Module, world_size: int
) -> torch.optim.Optimizer:
    """timm's optimizer; biases, norms, position embedding and tokens are not decayed."""
    options = optimizer_kwargs(config) | {"lr": scaled_lr(config, world_size)}
    if config.opt in ("adam", "adamw"):
        options["fused"] = True
    return create_optimizer_v2(model, **options)


def create_step_fn(
    config: ClassificationConfig, model: nn.Module, num_classes: int, device: torch.device
) -> Callable[[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The step of the recipe: mix, forward, loss."""
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

    def step(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        if mixup is not None:
            images, targets = mixup(images, targets)
        return {"loss": criterion(images, model(images), targets)}

    return step


def _create_teacher(
    config: ClassificationConfig, num_classes: int, device: torch.device
) -> nn.Module | None:
    if config.distillation_type == "none":
        return None
    teacher = timm.create_model(config.teacher_model, num_classes=num_classes)
    load_weights(teacher, load_checkpoint(config.teacher_path)["model"])
    return teacher.to(device).requires_grad_(False)
