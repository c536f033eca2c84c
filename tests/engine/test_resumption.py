"""Resuming from a checkpoint whose entries are wrong: one sentence, before anything is changed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import engine
from engine.optimizer_state import check_optimizer
from engine.resumption import check_classes, check_scaler, check_scheduler
from tests.engine.toy import ToyConfig, train

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    return train(ToyConfig(output_dir=str(folder), max_steps=5, epochs=3))


def resume(folder, content: Any) -> dict[str, Any]:
    torch.save(content, folder / "checkpoint.pth")
    return train(ToyConfig(output_dir=str(folder), epochs=3, max_steps=7), resume=True)


def with_value(content: dict, path: tuple, value: Any) -> dict:
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value(place.get(path[-1])) if callable(value) else value
    return content


STATE, GROUP, SCHEDULE = ("optimizer", "state"), ("optimizer", "param_groups", 0), "lr_scheduler"
FAULTS: list[tuple[tuple, Any, str]] = [
    (("epoch",), "3", "epoch must be a number >= -1, got 3"),
    (("epoch",), None, "epoch must be"),
    (("epoch",), True, "epoch must be"),
    (("epoch",), 10**30, "epoch must be"),
    (("step",), -1, "step must be a whole number >= 0, got -1"),
    (("step",), 2.0, "step must be"),
    (("step",), 12, "step must be at most 11, the optimizer steps of an epoch, got 12"),
    (("best",), NAN, "best must be a number, got nan"),
    (("best",), "high", "best must be"),
    (("evals_since_best",), -1, "evals_since_best must be a whole number >= 0, got -1"),
    (("evals_since_best",), "1", "evals_since_best must be"),
    (("images_per_step",), [4], "images_per_step must be"),
    (("optimizer",), None, "optimizer must be a dict with state and param_groups, got None"),
    (("optimizer",), [1], "optimizer must be"),
    (("optimizer", "param_groups"), {}, "optimizer.param_groups must be a list of dicts"),
    (("optimizer", "param_groups"), [], "optimizer.param_groups must be 1 entries, got 0"),
    (STATE, [], "optimizer.state must be a dict"),
    ((*STATE, 99), {}, "optimizer.state must be a dict with an entry per parameter"),
    ((*STATE, 0), 7, r"optimizer.state\[0\] must be a dict, got 7"),
    ((*STATE, 0), {"step": 1}, r"optimizer.state\[0\] must be a dict with .*exp_avg"),
    ((*STATE, 0, "exp_avg"), torch.zeros(2), r"exp_avg must be of shape \(16, 7\).*got \(2,\)"),
    ((*STATE, 0, "exp_avg"), torch.tensor(0.0), r"exp_avg must be of shape \(16, 7\).*got \(\)"),
    ((*STATE, 0, "exp_avg"), lambda t: t.T.contiguous(), "exp_avg must be of shape"),
    ((*STATE, 0, "exp_avg"), lambda t: t.T.contiguous().T, "strides of .*exp_avg must be"),
    ((*STATE, 0, "exp_avg"), torch.zeros(1).expand(16, 7), "strides of .*exp_avg must be"),
    ((*STATE, 0, "exp_avg"), lambda t: t.long(), "dtype of .*exp_avg must be torch.float32"),
    ((*STATE, 0, "exp_avg"), lambda t: t * NAN, "exp_avg must be a finite tensor"),
    ((*STATE, 0, "exp_avg"), "text", "exp_avg must be a number or a tensor, got text"),
    ((*STATE, 0, "exp_avg"), [], "exp_avg must be a tensor"),
    ((*STATE, 0, "step"), None, "step must be a number >= 0, got None"),
    ((*STATE, 0, "step"), torch.zeros(3), r"step must be a number >= 0"),
    ((*STATE, 0, "step"), -1, "step must be a number >= 0, got -1"),
    ((*GROUP, "params"), [0, 0, 1, 2, 3, 4], "optimizer.param_groups must be disjoint"),
    ((*GROUP, "params"), [0], "params must be 6 entries, got 1"),
    ((*GROUP, "lr"), "0.1", r"param_groups\[0\].lr must be a finite number, got 0.1"),
    ((*GROUP, "lr"), -1.0, "lr must be >= 0, got -1.0"),
    ((*GROUP, "lr"), INF, "lr must be a finite number"),
    ((*GROUP, "betas"), (0.9, 1.5), r"betas must be in \[0, 1\)"),
    ((*GROUP, "betas"), 0.9, "betas must be a list"),
    ((*GROUP, "eps"), None, "eps must be a finite number, got None"),
    ((*GROUP, "fused"), "yes", "fused must be true, false or none, got yes"),
    ((*GROUP, "maximize"), True, "maximize must be False, got True"),
    ((*GROUP, "capturable"), True, "capturable must be False, got True"),
    ((*GROUP, "step"), "text", "step must be a finite number, got text"),
    ((SCHEDULE,), None, "lr_scheduler must be a dict, got None"),
    ((SCHEDULE,), {}, "lr_scheduler must be a dict with base_lrs, last_epoch, lr_lambdas"),
    ((SCHEDULE, "last_epoch"), None, "lr_scheduler.last_epoch must be a finite number, got None"),
    ((SCHEDULE, "last_epoch"), [1], "lr_scheduler.last_epoch must be"),
    ((SCHEDULE, "base_lrs"), "text", "lr_scheduler.base_lrs must be a list, got text"),
    ((SCHEDULE, "base_lrs"), [], "lr_scheduler.base_lrs must be 1 entries, got 0"),
    ((SCHEDULE, "base_lrs"), [NAN], r"lr_scheduler.base_lrs\[0\] must be a finite number"),
    ((SCHEDULE, "lr_lambdas"), [{"step": 1}], r"lr_lambdas\[0\] must be none"),
    ((SCHEDULE, "get_lr"), 3, "lr_scheduler.get_lr must be absent, got 3"),
    ((SCHEDULE, "step"), None, "lr_scheduler.step must be absent, got None"),
    (("scaler",), [1], "scaler must be a dict"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), FAULTS)
def test_an_entry_of_the_wrong_kind_is_named(tmp_path, checkpoint, path, value, message):
    with pytest.raises(
        engine.UserError, match=f"cannot resume this training: [^ ]*.*{message}"
    ) as caught:
        resume(tmp_path, with_value(checkpoint, path, value))
    assert len(str(caught.value)) < 400


def test_an_untouched_checkpoint_resumes(tmp_path, checkpoint):
    assert resume(tmp_path, checkpoint)["epoch"] == -1


def test_entries_of_older_versions_may_be_missing_or_more(tmp_path, checkpoint):
    """Such as those of the first DeiT, whose optimizer had five hyperparameters."""
    old = copy.deepcopy(checkpoint)
    group = old["optimizer"]["param_groups"][0]
    for name in group.keys() - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params"}:
        del group[name]
    for state in old["optimizer"]["state"].values():
        state["step"] = int(state["step"])
    old["lr_scheduler"] |= {"verbose": False}
    for name in ("_is_initial", "_get_lr_called_within_step"):
        old["lr_scheduler"].pop(name, None)
    for name in ("best", "evals_since_best", "step", "scaler", "images_per_step", "provenance"):
        del old[name]
    resume(tmp_path, old)


def test_no_object_is_changed_by_a_refused_checkpoint(checkpoint):
    parameters = [torch.nn.Parameter(torch.ones(16, 7))]
    optimizer = torch.optim.AdamW(parameters, lr=0.3, fused=True)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(engine.UserError):
        check_optimizer(checkpoint["optimizer"], optimizer)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor", "adafactorbv", "lion", "muon"])
def test_states_of_the_optimizers_of_timm_are_accepted(name):
    from timm.optim import create_optimizer_v2

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(5, 2))
    optimizer = create_optimizer_v2(model, opt=name, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    check_optimizer(optimizer.state_dict(), create_optimizer_v2(model, opt=name, lr=0.1))


@pytest.mark.parametrize("name", ["cosine", "tanh", "step", "multistep", "poly"])
def test_a_schedule_of_timm_is_checked_like_one_of_torch(name):
    from timm.scheduler import create_scheduler_v2

    def create() -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        return create_scheduler_v2(
            optimizer, sched=name, num_epochs=9, decay_milestones=[3, 5], warmup_epochs=2
        )[0]

    saved = create().state_dict()
    check_scheduler(saved, create())
    check_scheduler(saved | {"t_mul": 1.0}, create())  # of timm 0.3
    for fault in ({"base_values": None}, {"update_groups": 1}, {"warmup_t": "5"}):
        with pytest.raises(engine.UserError, match=f"lr_scheduler.{next(iter(fault))} must be"):
            check_scheduler(saved | fault, create())


@pytest.mark.parametrize("decay", [None, 0.7])
def test_a_plateau_schedule_is_checked_with_and_without_layer_decay(decay):
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)

    def create() -> tuple[Any, Any]:
        optimizer = create_optimizer_v2(model, opt="adamw", lr=0.1, layer_decay=decay)
        return optimizer, create_scheduler_v2(optimizer, sched="plateau", num_epochs=9)[0]

    optimizer, scheduler = create()
    scheduler.step(0, 0.5)
    scheduler.step(1, 0.4)
    other, other_scheduler = create()
    check_optimizer(optimizer.state_dict(), other)
    check_scheduler(scheduler.state_dict(), other_scheduler)
    with pytest.raises(engine.UserError, match=r"lr_scheduler\.best must be"):
        check_scheduler(scheduler.state_dict() | {"best": None}, other_scheduler)


@pytest.mark.parametrize(
    "change", [{"scale": 0.0}, {"scale": NAN}, {"growth_interval": 2.5}, {"_growth_tracker": None}]
)
def test_the_state_of_the_scaler_is_checked(change):
    scaler = torch.amp.GradScaler("cpu")
    check_scaler(scaler.state_dict(), scaler)
    with pytest.raises(engine.UserError, match=f"scaler.{next(iter(change))} must be"):
        check_scaler(scaler.state_dict() | change, scaler)


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ({"classes": ["a", "b"]}, {"classes": ["b", "a"]}, "classes .* 'a' for label 0, got 'b'"),
        ({"classes": ["a"]}, {"classes": ["a", "b"]}, "which has 1 entries, got 2"),
        (
            {"label_to_category": {0: 3, 1: 7}},
            {"label_to_category": {0: 7, 1: 3}},
            "label_to_category .* 3 for label 0, got 7",
        ),
        ({"task": "detection"}, {"task": "classification"}, "task .* 'detection', got 'classif"),
    ],
)
def test_labels_that_mean_something_else_are_refused(saved, own, message):
    with pytest.raises(engine.UserError, match=f"{message}.*--finetune"):
        check_classes(saved, own)
    check_classes(own, own)
    check_classes({}, own)
    check_classes(saved, {})


@pytest.mark.parametrize("batch_size", [4, 2, 11])
def test_the_schedule_continues_at_its_epoch_with_another_batch_size(
    batch_size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(ToyConfig(output_dir=str(tmp_path), epochs=1))
    caplog.clear()
    options = {"output_dir": str(tmp_path), "epochs": 2, "batch_size": batch_size}
    content = train(ToyConfig(**options), resume=True)
    steps = 2 * (44 // batch_size)
    assert content["lr_scheduler"]["last_epoch"] == steps
    assert content["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.05 / (1 + steps))
    warned = f"total batch size changed from 4 to {batch_size} images" in caplog.text
    assert warned == (batch_size != 4)
