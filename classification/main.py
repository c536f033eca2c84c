"""Train and evaluate DeiT with iRPE. `python -m classification.main --help` lists the options."""

import json
import logging
import time
from pathlib import Path

import timm
import torch
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from classification.build import create_ema, create_model, create_optimizer, create_step_fn
from classification.config import ClassificationConfig, parse_args
from classification.data import build_split, eval_loader, train_loader
from classification.evaluate import evaluate
from datasets import DataError
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

logger = logging.getLogger("classification")


def main(argv: list[str] | None = None) -> None:
    """Run what the flags say: a training, or with `--eval` an evaluation."""
    config = parse_args(argv)
    world, output_dir = start_run(config, timm=timm.__version__)
    source = checkpoint_to_resume(config)
    checkpoint = load_checkpoint(source) if source else None
    if config.eval:
        evaluate_only(config, world, checkpoint, output_dir)
    else:
        train(config, world, checkpoint, output_dir)


def train(
    config: ClassificationConfig, world: World, checkpoint: dict | None, output_dir: Path | None
) -> None:
    """Train from scratch, or from where `checkpoint` stopped."""
    if checkpoint is not None:
        check_resumable(checkpoint)
    train_data = build_split(config, "train")
    val_data = build_split(config, "val", train_data.classes)
    train_batches = train_loader(train_data, config, world)
    val_batches = eval_loader(val_data, config, world)

    model = create_model(config, len(train_data.classes), checkpoint).to(world.device)
    operators = set_implementation(model, config.rpe_implementation, world.device)
    ema = create_ema(config, model, checkpoint)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%s: %d parameters", config.model, n_parameters)
    optimizer = create_optimizer(config, model, world.world_size)
    scheduler, _ = create_scheduler(config, optimizer)
    if config.compile:
        model.compile()
    model = distribute(model, world)

    dtype = _dtype(config, world)
    state = TrainState(model, optimizer, make_scaler(world.device, dtype), config.start_epoch)
    if checkpoint is not None:
        restore(state, scheduler, checkpoint, images_per_step(config, world))
    options = loop_options(
        config,
        world,
        steps=len(train_batches) // config.accumulate_steps,
        dtype=dtype,
        clip_grad=config.clip_grad,
        output_dir=output_dir,
    )
    step_fn = create_step_fn(config, model, len(train_data.classes), world.device)
    files = CheckpointDir(output_dir, config.keep_checkpoints) if output_dir else None

    def save(*, is_best: bool = False, epoch: int | None = None) -> None:
        if files is not None and world.is_main:
            content = state.state_dict() | {
                "lr_scheduler": scheduler.state_dict(),
                "model_ema": ema.module.state_dict() if ema else None,
                "args": dump(config),
                "classes": list(train_data.classes),
                "images_per_step": images_per_step(config, world),
                "provenance": provenance() | {"rpe_ops": operators},
            }
            files.save(content, is_best=is_best, epoch=epoch)

    def update_ema() -> None:
        if ema is not None:
            ema.update(unwrap(model))

    fit(
        step_fn,
        train_batches,
        state,
        options,
        epochs=config.epochs,
        eval_interval=config.eval_interval,
        evaluate=lambda: evaluate_all(config, unwrap(model), ema, val_batches, world),
        best_by="acc1",
        step_schedule=scheduler.step,
        save=save,
        facts={"n_parameters": n_parameters},
        on_step=update_ema,
    )
    _warn_of_bad_images(train_data, val_data)


def evaluate_only(
    config: ClassificationConfig, world: World, checkpoint: dict | None, output_dir: Path | None
) -> None:
    """Evaluate a checkpoint or the published weights; writes `eval.json` into `output_dir`."""
    if checkpoint is None and not (config.pretrained or config.finetune):
        raise UsageError("--eval needs weights: --resume, --pretrained or --finetune")
    val_data = build_split(config, "val", (checkpoint or {}).get("classes"))
    model = create_model(config, len(val_data.classes), checkpoint).to(world.device)
    set_implementation(model, config.rpe_implementation, world.device)
    has_ema = checkpoint is not None and checkpoint.get("model_ema") is not None
    ema = create_ema(config, model, checkpoint) if has_ema else None
    if config.compile:
        model.compile()
    start = time.perf_counter()
    test = evaluate_all(config, model, ema, eval_loader(val_data, config, world), world)
    speed = len(val_data) / (time.perf_counter() - start)
    figures = "  ".join(f"{name} {value:.6g}" for name, value in test.items())
    logger.info("%d images, %.4g a second: %s", len(val_data), speed, figures)
    if output_dir is not None and world.is_main:
        record = {f"test_{name}": value for name, value in test.items()}
        record |= {"images": len(val_data), "images_per_s": speed}
        (output_dir / "eval.json").write_text(json.dumps(record) + "\n")
    _warn_of_bad_images(val_data)


def evaluate_all(
    config: ClassificationConfig,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    loader: DataLoader,
    world: World,
) -> dict[str, float]:
    """Figures of the weights and, as `ema_*`, of their moving average."""
    models = {"": model}
    if ema is not None:
        models["ema_"] = ema.module.to(world.device)
    dtype = _dtype(config, world)
    figures = evaluate(models, loader, world.device, dtype, shared=config.dist_eval)
    if ema is not None and config.model_ema_force_cpu:
        ema.module.to("cpu")
    return figures


def _dtype(config: ClassificationConfig, world: World) -> torch.dtype:
    """Of autocast: DeiT was trained in float16 on GPUs."""
    gpu = world.device.type == "cuda"
    return resolve_dtype(config.dtype, auto=torch.float16 if gpu else torch.float32)


def _warn_of_bad_images(*datasets) -> None:
    bad = sum(dataset.bad_count for dataset in datasets)
    if bad:
        logger.warning("%d image reads were bad and replaced; their names are above", bad)


if __name__ == "__main__":
    run(main, DataError, CheckpointError, ImplementationError)
