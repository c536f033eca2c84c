"""Train and evaluate DETR with iRPE. `python -m detection.main --help` lists the options."""

import json
import logging
import time
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from datasets import DataError, ResilientDataset
from detection.build import (
    create_ema,
    create_schedule,
    create_step_fn,
    load_start_weights,
    param_groups,
)
from detection.coco_eval import CocoEvaluator, format_figures
from detection.config import DetectionConfig, parse_args
from detection.data import build_split, eval_loader, train_loader
from detection.detr import build_model
from detection.evaluate import evaluate
from engine import (
    CheckpointDir,
    TrainState,
    UsageError,
    World,
    check_resumable,
    checkpoint_to_resume,
    distribute,
    dump,
    fit,
    images_per_step,
    loop_options,
    make_scaler,
    provenance,
    resolve_dtype,
    restore,
    run,
    start_run,
    unwrap,
)
from irpe_core import CheckpointError, ImplementationError, load_checkpoint, set_implementation

__all__ = ["main"]

logger = logging.getLogger("detection")


def main(argv: list[str] | None = None) -> None:
    """Run what the flags say: a training, or with `--eval` an evaluation."""
    config = parse_args(argv)
    world, output_dir = start_run(config)
    source = checkpoint_to_resume(config)
    checkpoint = load_checkpoint(source) if source else None
    if config.eval:
        evaluate_only(config, world, checkpoint, output_dir)
    else:
        train(config, world, checkpoint, output_dir)


def train(
    config: DetectionConfig, world: World, checkpoint: dict | None, output_dir: Path | None
) -> None:
    """Train from scratch, or from where `checkpoint` stopped."""
    if checkpoint is not None:
        check_resumable(checkpoint)
    train_data = build_split(config, "train")
    labels = train_data.dataset.label_to_category
    val_data = build_split(config, "val", labels)
    train_batches = train_loader(train_data, config, world)
    val_batches = eval_loader(val_data, config, world)

    model, criterion, postprocessors = create_parts(
        config, train_data.dataset.num_classes, checkpoint, world.device
    )
    operators = set_implementation(model, config.rpe_implementation, world.device)
    ema = create_ema(config, model, checkpoint)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%d parameters are trained", n_parameters)
    optimizer = torch.optim.AdamW(
        param_groups(config, model), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    if config.compile:
        model.compile()
    model = distribute(model, world)

    dtype = resolve_dtype(config.dtype, auto=torch.float32)
    steps = len(train_batches) // config.accumulate_steps
    scheduler, every_step = create_schedule(config, optimizer, steps)
    state = TrainState(model, optimizer, make_scaler(world.device, dtype), config.start_epoch)
    if checkpoint is not None:
        restore(state, scheduler, checkpoint, images_per_step(config, world))
    options = loop_options(
        config,
        world,
        steps=steps,
        dtype=dtype,
        clip_grad=config.clip_max_norm or None,
        output_dir=output_dir,
    )
    files = CheckpointDir(output_dir, config.keep_checkpoints) if output_dir else None

    def save(*, is_best: bool = False, epoch: int | None = None) -> None:
        if files is not None and world.is_main:
            content = state.state_dict() | {
                "lr_scheduler": scheduler.state_dict(),
                "model_ema": ema.module.state_dict() if ema else None,
                "args": dump(config),
                "label_to_category": labels,
                "images_per_step": images_per_step(config, world),
                "provenance": provenance() | {"rpe_ops": operators},
            }
            files.save(content, is_best=is_best, epoch=epoch)

    def after_step() -> None:
        if every_step:
            scheduler.step()
        if ema is not None:
            ema.update(unwrap(model))

    def after_epoch(epoch: int, ap: float) -> None:
        if not every_step:
            scheduler.step()

    def test() -> dict[str, float]:
        models = {"": unwrap(model)} | ({"ema_": ema.module} if ema else {})
        return evaluate_all(config, models, criterion, postprocessors, val_data, val_batches, world)

    fit(
        create_step_fn(model, criterion),
        train_batches,
        state,
        options,
        epochs=config.epochs,
        eval_interval=config.eval_interval,
        evaluate=test,
        best_by="AP",
        step_schedule=after_epoch,
        save=save,
        facts={"n_parameters": n_parameters},
        on_step=after_step,
    )


def evaluate_only(
    config: DetectionConfig, world: World, checkpoint: dict | None, output_dir: Path | None
) -> None:
    """Evaluate a checkpoint; prints COCO's table and writes `eval.json` into `output_dir`."""
    if checkpoint is None and not config.finetune:
        raise UsageError("--eval needs weights: --resume or --finetune")
    val_data = build_split(config, "val", (checkpoint or {}).get("label_to_category"))
    model, criterion, postprocessors = create_parts(
        config, val_data.dataset.num_classes, checkpoint, world.device
    )
    set_implementation(model, config.rpe_implementation, world.device)
    models: dict[str, nn.Module] = {"": model}
    if checkpoint is not None and checkpoint.get("model_ema") is not None:
        models["ema_"] = ModelEmaV3(model).module
        load_start_weights(config, models["ema_"], {"model": checkpoint["model_ema"]})
    batches = eval_loader(val_data, config, world)
    start = time.perf_counter()
    figures = evaluate_all(config, models, criterion, postprocessors, val_data, batches, world)
    speed = len(val_data) / (time.perf_counter() - start)
    logger.info("%d images, %.4g a second\n%s", len(val_data), speed, format_figures(figures))
    if output_dir is not None and world.is_main:
        record = {f"test_{name}": value for name, value in figures.items()}
        record |= {"images": len(val_data), "images_per_s": speed}
        (output_dir / "eval.json").write_text(json.dumps(record) + "\n")


def create_parts(
    config: DetectionConfig, num_classes: int, checkpoint: dict | None, device: torch.device
) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Model with its starting weights, losses and post-processing.

    Raises:
        UsageError: Options that do not go together.
        CheckpointError: Weights that cannot be read or do not fit.
    """
    torch.manual_seed(config.seed)
    if config.num_classes is None:
        config = config.model_copy(update={"num_classes": num_classes})
    if config.num_classes < num_classes:
        raise UsageError(
            f"--num_classes is {config.num_classes} but the data has labels up to {num_classes - 1}"
        )
    try:
        model, criterion, postprocessors = build_model(
            config, load=not (checkpoint or config.finetune)
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    load_start_weights(config, model, checkpoint)
    return model.to(device), criterion.to(device), postprocessors


def evaluate_all(
    config: DetectionConfig,
    models: dict[str, nn.Module],
    criterion: nn.Module,
    postprocessors: dict[str, nn.Module],
    data: ResilientDataset,
    loader: DataLoader,
    world: World,
) -> dict[str, float]:
    """Losses and COCO figures of every model, under its prefix."""
    iou_types = ("bbox", "segm") if config.masks else ("bbox",)
    evaluator = CocoEvaluator(data.dataset.coco, iou_types, data.dataset.label_to_category)
    figures = {}
    for prefix, model in models.items():
        of_model = evaluate(
            model,
            criterion,
            postprocessors,
            loader,
            evaluator,
            world.device,
            resolve_dtype(config.dtype, auto=torch.float32),
            pad_to_batch=config.eval_padding,
        )
        figures |= {f"{prefix}{name}": value for name, value in of_model.items()}
    return figures


if __name__ == "__main__":
    run(main, DataError, CheckpointError, ImplementationError)
