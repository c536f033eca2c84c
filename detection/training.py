"""The training and evaluation of `detection.main`, which imports this after its flags."""

from dataclasses import replace
from functools import partial

from detection.build import (
    autocast_dtype,
    create_detector,
    create_ema,
    create_evaluation,
    create_optimizer,
    create_schedule,
    create_step,
)
from detection.coco_eval import format_metrics
from detection.config import DetectionConfig
from detection.data import build_split, train_loader
from detection.report import DetectionReport
from detection.saved import complete, describe
from engine import (
    Recipe,
    Session,
    UsageError,
    run_evaluation,
    run_training,
    start_session,
    steps_per_epoch,
)
from irpe_core import AUTOTUNER, load_checkpoint, set_implementation

__all__ = ["evaluate", "start", "train"]


def start(config: DetectionConfig) -> None:
    """Train, or evaluate with `--eval`."""
    session = start_session(config, load_checkpoint, complete)
    run_mode = evaluate if session.config.eval else train
    run_mode(session.config, session)


def train(config: DetectionConfig, session: Session) -> None:
    """Train by the recipe of DETR (Carion et al., ECCV 2020), with iRPE in the encoder."""
    device, checkpoint = session.device, session.checkpoint
    train_data = build_split(config, "train")
    label_to_category = train_data.dataset.label_to_category
    val_data = build_split(config, "val", label_to_category)
    batches = train_loader(train_data, config, device)
    num_classes = train_data.dataset.num_classes
    if config.num_classes is None:
        # Record it in the checkpoints, whose `args` then describe the whole model.
        config = config.model_copy(update={"num_classes": num_classes})
        session = replace(session, config=config)

    model, criterion, postprocessors = create_detector(config, num_classes, checkpoint, device)
    choices = (checkpoint or {}).get("attention_choices")
    operators = set_implementation(model, config.rpe_implementation, device, choices=choices)
    ema = create_ema(config, model, checkpoint)
    step = create_step(criterion)
    optimizer = create_optimizer(config, model)
    steps = steps_per_epoch(config, batches)
    scheduler, schedule_per_step = create_schedule(config, optimizer, steps)
    report = DetectionReport(train_data.classes, config.log_images)
    evaluation = partial(create_evaluation, config, criterion, postprocessors, val_data, device)

    recipe = Recipe(
        model=model,
        ema=ema,
        batches=batches,
        step=step,
        optimizer=optimizer,
        scheduler=scheduler,
        schedule_per_step=schedule_per_step,
        dtype=autocast_dtype(config),
        clip_grad=config.clip_max_norm or None,
        evaluate=evaluation(report=report),
        sanity=evaluation(batches=2),
        report=report.result,
        # A frozen detector always finds the same boxes.
        best_by="segm_AP" if config.frozen_weights else "AP",
        console_metrics=("loss", "class_error", "AP", "AP50", "AP75", "segm_AP", "ema_AP"),
        data={
            "images": f"{len(train_data):,} training, {len(val_data):,} validation",
            "classes": f"{len(label_to_category):,}, labels up to {num_classes - 1}",
        },
        checkpoint_extras=lambda: {
            **describe(config, train_data.classes, label_to_category),
            "attention_choices": AUTOTUNER.state_dict(),
        },
        versions={"rpe_ops": operators},
    )
    run_training(session, recipe)
    for data in (train_data, val_data):
        data.warn_if_bad()
        data.dataset.warn_if_other_size()


def evaluate(config: DetectionConfig, session: Session) -> None:
    """Evaluate a checkpoint: print COCO's metrics, write `eval.json` to the output folder."""
    device, checkpoint = session.device, session.checkpoint
    if checkpoint is None and not config.finetune:
        raise UsageError("--eval needs weights: --resume or --finetune")
    val_data = build_split(config, "val", (checkpoint or {}).get("label_to_category"))
    num_classes = val_data.dataset.num_classes
    model, criterion, postprocessors = create_detector(config, num_classes, checkpoint, device)
    choices = (checkpoint or {}).get("attention_choices")
    set_implementation(model, config.rpe_implementation, device, choices=choices)
    report = DetectionReport(val_data.classes, config.log_images)
    run_evaluation(
        session,
        model,
        create_evaluation(config, criterion, postprocessors, val_data, device, report=report),
        ema=create_ema(config, model, checkpoint),
        num_images=len(val_data),
        describe=format_metrics,
        report=report.result,
    )
    val_data.warn_if_bad()
    val_data.dataset.warn_if_other_size()
