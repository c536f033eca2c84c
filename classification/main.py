"""Train and evaluate DeiT with iRPE. `python -m classification.main --help` lists the options."""

import json
import logging
from pathlib import Path

import timm
import torch
import yaml
from timm.scheduler import create_scheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import rpe_ops
from classification.build import create_ema, create_model, create_optimizer, create_step_fn
from classification.config import ClassificationConfig, parse_args
from classification.data import build_split, eval_loader, train_loader
from classification.evaluate import evaluate
from datasets import DataError
from engine import (
    DTYPES,
    CheckpointDir,
    LoopOptions,
    RunLog,
    StopRequest,
    TrainState,
    UsageError,
    UserError,
    World,
    check_writable,
    dump,
    init_distributed,
    make_scaler,
    provenance,
    run,
    setup_logging,
    train_epoch,
    unwrap,
)
from irpe_core import CheckpointError, load_checkpoint

__all__ = ["main"]

logger = logging.getLogger("classification")


def main(argv: list[str] | None = None) -> None:
    """Run what the flags say: a training, or with `--eval` an evaluation."""
    config = parse_args(argv)
    world = init_distributed(config.device)
    output_dir = check_writable(config.output_dir) if config.output_dir else None
    setup_logging(output_dir, world.rank)
    _check_world_size(config, world)
    checkpoint = _checkpoint_to_resume(config, output_dir)
    _describe_run(config, world, output_dir)
    if config.eval:
        evaluate_only(config, world, checkpoint, output_dir)
    else:
        train(config, world, checkpoint, output_dir)


def train(
    config: ClassificationConfig, world: World, checkpoint: dict | None, output_dir: Path | None
) -> None:
    """Train from scratch, or from where `checkpoint` stopped."""
    train_data = build_split(config, "train")
    val_data = build_split(config, "val", train_data.classes)
    train_batches = train_loader(train_data, config, world)
    val_batches = eval_loader(val_data, config, world)

    model = create_model(config, len(train_data.classes), checkpoint).to(world.device)
    ema = create_ema(config, model, checkpoint)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%s: %d parameters", config.model, n_parameters)
    optimizer = create_optimizer(config, model, world.world_size)
    scheduler, _ = create_scheduler(config, optimizer)
    if config.compile:
        model.compile()
    if world.world_size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids)

    dtype = resolve_dtype(config, world)
    steps = len(train_batches) // config.accumulate_steps
    state = TrainState(model, optimizer, make_scaler(world.device, dtype), config.start_epoch)
    if checkpoint is not None:
        _restore(state, scheduler, checkpoint, _images_per_step(config, world))
    options = LoopOptions(
        device=world.device,
        steps=steps,
        batch_size=config.batch_size,
        seed=config.seed,
        dtype=dtype,
        accumulate=config.accumulate_steps,
        clip_grad=config.clip_grad,
        print_freq=config.print_freq,
        checkpoint_steps=config.checkpoint_steps or 0,
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
                "images_per_step": _images_per_step(config, world),
                "provenance": provenance(),
            }
            files.save(content, is_best=is_best, epoch=epoch)

    def update_ema() -> None:
        if ema is not None:
            ema.update(unwrap(model))

    done = state.epoch * steps + state.step
    with StopRequest() as stop, RunLog(output_dir, start_step=done) as log:
        while state.epoch < config.epochs:
            epoch = state.epoch
            train_batches.sampler.set_epoch(
                epoch, start=state.step * config.batch_size * config.accumulate_steps
            )
            figures = train_epoch(
                step_fn,
                train_batches,
                state,
                options,
                stop=stop,
                log=log,
                on_step=update_ema,
                save=save,
            )
            test = evaluate_all(config, unwrap(model), ema, val_batches, world)
            scheduler.step(epoch, test["acc1"])
            is_best = test["acc1"] > state.best
            state.best = max(state.best, test["acc1"])
            state.finish_epoch()
            record = {"epoch": epoch, "n_parameters": n_parameters}
            record |= {f"train_{name}": value for name, value in figures.items()}
            record |= {f"test_{name}": value for name, value in test.items()}
            log.write_epoch(record, state.epoch * steps)
            save(is_best=is_best, epoch=epoch)
            logger.info("epoch %d: %s  (best %.3f)", epoch, _in_words(test), state.best)
            stop.check(save)
    _warn_of_bad_images(train_data, val_data)


def evaluate_only(
    config: ClassificationConfig, world: World, checkpoint: dict | None, output_dir: Path | None
) -> None:
    """Evaluate a checkpoint or the published weights; writes `eval.json` into `output_dir`."""
    if checkpoint is None and not (config.pretrained or config.finetune):
        raise UsageError("--eval needs weights: --resume, --pretrained or --finetune")
    val_data = build_split(config, "val", (checkpoint or {}).get("classes"))
    model = create_model(config, len(val_data.classes), checkpoint).to(world.device)
    has_ema = checkpoint is not None and checkpoint.get("model_ema") is not None
    ema = create_ema(config, model, checkpoint) if has_ema else None
    if config.compile:
        model.compile()
    test = evaluate_all(config, model, ema, eval_loader(val_data, config, world), world)
    logger.info("%d images: %s", len(val_data), _in_words(test))
    if output_dir is not None and world.is_main:
        record = {f"test_{name}": value for name, value in test.items()}
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
    dtype = resolve_dtype(config, world)
    figures = evaluate(models, loader, world.device, dtype, shared=config.dist_eval)
    if ema is not None and config.model_ema_force_cpu:
        ema.module.to("cpu")
    return figures


def resolve_dtype(config: ClassificationConfig, world: World) -> torch.dtype:
    """`auto` is float16 on a GPU, as DeiT trains, and float32 elsewhere."""
    if config.dtype == "auto":
        return torch.float16 if world.device.type == "cuda" else torch.float32
    return DTYPES[config.dtype]


def _images_per_step(config: ClassificationConfig, world: World) -> int:
    return config.batch_size * config.accumulate_steps * world.world_size


def _check_world_size(config: ClassificationConfig, world: World) -> None:
    if config.world_size not in (1, world.world_size):
        raise UsageError(
            f"--world_size is {config.world_size} but {world.world_size} processes were started: "
            "leave it to torchrun"
        )


def _checkpoint_to_resume(config: ClassificationConfig, output_dir: Path | None) -> dict | None:
    """The checkpoint to go on from; an explicit one beats the newest in `output_dir`."""
    newest = None
    if config.auto_resume and not config.resume:
        newest = CheckpointDir(output_dir).latest()
    source = config.resume or newest
    if not source:
        return None
    logger.info("resuming from %s", source)
    return load_checkpoint(source)


def _restore(
    state: TrainState, scheduler: Scheduler, checkpoint: dict, images_per_step: int
) -> None:
    """Bring optimizer, schedule and position back; the weights are loaded already.

    Raises:
        UserError: The checkpoint holds weights alone, or is from the middle of an epoch whose
            steps were of another size.
    """
    missing = [name for name in ("optimizer", "lr_scheduler", "epoch") if name not in checkpoint]
    if missing:
        raise UserError(
            f"the checkpoint has no {', '.join(missing)} to resume training with: "
            "use --finetune to start from its weights, or --eval"
        )
    before = checkpoint.get("images_per_step", images_per_step)
    if checkpoint.get("step") and before != images_per_step:
        raise UserError(
            f"the checkpoint is from the middle of an epoch at {before} images a step, now it is "
            f"{images_per_step}: resume with the same batch size and number of processes"
        )
    state.load_state_dict(checkpoint)
    scheduler.load_state_dict(checkpoint["lr_scheduler"])


def _describe_run(config: ClassificationConfig, world: World, output_dir: Path | None) -> None:
    """Log what runs, and save the resolved configuration as `config.yaml`."""
    implementations = rpe_ops.available_implementations(world.device)
    chosen = next(name for name, reason in implementations.items() if not reason)
    origin = provenance() | {"timm": timm.__version__, "rpe_ops": chosen}
    logger.info("%s, %d process(es), %s", world.device, world.world_size, origin)
    if output_dir is not None and world.is_main and not config.eval:
        text = yaml.safe_dump(dump(config), sort_keys=False)
        (output_dir / "config.yaml").write_text(f"# {json.dumps(origin)}\n{text}")


def _in_words(figures: dict[str, float]) -> str:
    text = "top-1 {acc1:.3f}, top-5 {acc5:.3f}, loss {loss:.6f}".format(**figures)
    if "ema_acc1" in figures:
        text += "; EMA top-1 {ema_acc1:.3f}, top-5 {ema_acc5:.3f}".format(**figures)
    return text


def _warn_of_bad_images(*datasets) -> None:
    bad = sum(dataset.bad_count for dataset in datasets)
    if bad:
        logger.warning("%d image reads were bad and replaced; their names are above", bad)


if __name__ == "__main__":
    run(main, DataError, CheckpointError)
