"""The training and evaluation of `classification.main`, which imports this after its flags."""

import timm

from classification.build import (
    autocast_dtype,
    create_ema,
    create_evaluation,
    create_model,
    create_optimizer,
    create_schedule,
    create_step,
)
from classification.config import ClassificationConfig
from classification.data import build_split, train_loader
from classification.report import ClassReport
from classification.saved import complete, describe
from engine import (
    Recipe,
    Session,
    UsageError,
    run_evaluation,
    run_training,
    start_session,
    total_batch_size,
)
from irpe_core import AUTOTUNER, load_checkpoint, set_implementation

__all__ = ["evaluate", "start", "train"]


def start(config: ClassificationConfig) -> None:
    """Train, or evaluate with `--eval`."""
    session = start_session(config, load_checkpoint, complete, timm=timm.__version__)
    run_mode = evaluate if session.config.eval else train
    run_mode(session.config, session)


def train(config: ClassificationConfig, session: Session) -> None:
    """Train by the recipe of DeiT (Touvron et al., ICML 2021), with iRPE in the attention."""
    device, checkpoint = session.device, session.checkpoint
    train_data = build_split(config, "train")
    val_data = build_split(config, "val", train_data.classes)
    batches = train_loader(train_data, config, device)
    num_classes = len(train_data.classes)

    model = create_model(config, num_classes, checkpoint).to(device)
    choices = (checkpoint or {}).get("attention_choices")
    operators = set_implementation(model, config.rpe_implementation, device, choices=choices)
    ema = create_ema(config, model, checkpoint)
    step = create_step(config, num_classes, device)
    report = ClassReport(train_data.classes, config.log_images)
    optimizer = create_optimizer(config, model, total_batch_size(config))
    scheduler = create_schedule(config, optimizer)

    recipe = Recipe(
        model=model,
        ema=ema,
        batches=batches,
        step=step,
        optimizer=optimizer,
        scheduler=scheduler,
        dtype=autocast_dtype(config, device),
        clip_grad=config.clip_grad,
        evaluate=create_evaluation(config, val_data, device, report=report),
        sanity=create_evaluation(config, val_data, device, batches=2),
        report=report.result,
        best_by="acc1",
        console_metrics=("loss", "acc1", "acc5", "ema_acc1", "ema_acc5"),
        data={
            "images": f"{len(train_data):,} training, {len(val_data):,} validation",
            "classes": f"{num_classes:,}",
        },
        checkpoint_extras=lambda: {
            **describe(config, train_data.classes),
            "attention_choices": AUTOTUNER.state_dict(),
        },
        versions={"rpe_ops": operators},
    )
    run_training(session, recipe)
    for data in (train_data, val_data):
        data.warn_if_bad()


def evaluate(config: ClassificationConfig, session: Session) -> None:
    """Evaluate a checkpoint or the published weights; write `eval.json` to the output folder."""
    device, checkpoint = session.device, session.checkpoint
    if checkpoint is None and not (config.pretrained or config.finetune):
        raise UsageError("--eval needs weights: --resume, --pretrained or --finetune")
    val_data = build_split(config, "val", (checkpoint or {}).get("classes"))
    model = create_model(config, len(val_data.classes), checkpoint).to(device)
    choices = (checkpoint or {}).get("attention_choices")
    set_implementation(model, config.rpe_implementation, device, choices=choices)
    report = ClassReport(val_data.classes, config.log_images)
    run_evaluation(
        session,
        model,
        create_evaluation(config, val_data, device, report=report),
        ema=create_ema(config, model, checkpoint),
        num_images=len(val_data),
        report=report.result,
    )
    val_data.warn_if_bad()
