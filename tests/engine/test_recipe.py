"""A recipe in a session: what is refused, and what every checkpoint contains."""

import copy
import json
import os
import signal
from functools import partial

import pytest
import torch
from timm.utils import ModelEmaV3

import engine
from engine import session
from tests.engine import toy
from tests.engine.toy import ToyConfig, equal, train


def test_an_epoch_without_a_whole_step_is_refused():
    with pytest.raises(engine.UsageError, match=r"must be at most 44, .* got 9 x 5"):
        train(ToyConfig(batch_size=9, accumulate_steps=5))


def test_a_trainer_without_evaluation_refuses_to_evaluate():
    with pytest.raises(engine.UsageError, match="has no --eval"):
        train(ToyConfig(eval=True))


def test_a_trainer_without_pictures_refuses_log_images(tmp_path):
    with pytest.raises(engine.UsageError, match="has no --log_images"):
        train(ToyConfig(log_images=3, output_dir=str(tmp_path)))


def test_the_metric_of_the_best_checkpoint_must_exist(monkeypatch):
    monkeypatch.setattr(toy, "evaluate", lambda models: {"accuracy": 1.0})
    with pytest.raises(KeyError, match="mean"):
        train(ToyConfig())


def test_the_best_checkpoint_is_of_the_best_evaluation(monkeypatch, tmp_path):
    values = iter([1.0, 3.0, float("nan"), 2.0])
    monkeypatch.setattr(toy, "evaluate", lambda models: {"mean": next(values)})
    last = train(ToyConfig(epochs=4, output_dir=str(tmp_path)))
    best = torch.load(tmp_path / "best_checkpoint.pth", weights_only=True)
    assert (best["epoch"], best["best"]) == (1, 3.0)
    assert (last["epoch"], last["best"]) == (3, 3.0)


def test_the_warm_up_of_the_ema_counts_the_steps_of_the_whole_run(monkeypatch, tmp_path):
    decays = []

    def get_decay(self, step=None):
        decays.append(original(self, step))
        return decays[-1]

    original = ModelEmaV3.get_decay
    monkeypatch.setattr(ModelEmaV3, "get_decay", get_decay)
    train(ToyConfig())
    assert decays == [0.9] * 22
    decays.clear()
    options = {"ema_warmup": True, "output_dir": str(tmp_path), "epochs": 4}
    train(ToyConfig(**options, max_steps=15))
    train(ToyConfig(**options), resume=True)
    # The first update copies the weights. The decay reaches its maximum after 32 steps.
    assert decays == [0.0] + [min(1 - (1 + step) ** (-2 / 3), 0.9) for step in range(1, 44)]


def train_on(metrics, monkeypatch, *, resume=False, **options):
    """Train the toy with these metrics of its evaluations; return the last checkpoint."""
    values = iter(metrics)
    monkeypatch.setattr(toy, "evaluate", lambda models: {"mean": next(values)})
    return train(ToyConfig(epochs=9, early_stop=2, **options), resume=resume)


@pytest.mark.parametrize(
    ("metrics", "epoch"),
    [([1.0, 3.0, 2.0, 3.0], 3), ([0.0, float("nan"), float("nan")], 2), (range(9), 8)],
    ids=["not better", "nan", "always better"],
)
def test_a_run_stops_early_if_the_metric_does_not_improve(metrics, epoch, monkeypatch, caplog):
    caplog.set_level("INFO")
    last = train_on(metrics, monkeypatch)
    assert last["epoch"] == epoch
    stopped = [message for message in caplog.messages if message.startswith("early stop")]
    assert len(stopped) == (epoch < 8)


def test_patience_counts_evaluations(monkeypatch):
    last = train_on([3.0, 2.0, 1.0], monkeypatch, eval_interval=2)
    assert (last["epoch"], last["evals_since_best"]) == (5, 2)


def test_a_resumed_run_stops_early_at_the_same_epoch(monkeypatch, tmp_path):
    metrics = [1.0, 3.0, 2.0, 2.5]
    uninterrupted = train_on(metrics, monkeypatch)
    options = {"output_dir": str(tmp_path)}
    with pytest.raises(engine.Stopped):
        train_on(metrics, monkeypatch, **options, kill_at=(toy.SIGTERM, 3, 5))
    resumed = train_on(metrics[3:], monkeypatch, **options, resume=True)
    for name in uninterrupted.keys() - {"args"}:
        assert equal(uninterrupted[name], resumed[name]), name
    # Without more patience, the run does not continue.
    assert train_on([], monkeypatch, **options, resume=True)["epoch"] == 3


def test_an_evaluation_within_an_epoch_does_not_count_for_early_stop(monkeypatch, tmp_path):
    options = {"output_dir": str(tmp_path)}
    halfway = train_on([3.0, 1.0], monkeypatch, **options, max_steps=15)
    assert (halfway["step"], halfway["evals_since_best"]) == (4, 0)
    last = train_on([2.0, 2.0], monkeypatch, **options, resume=True)
    assert last["epoch"] == 2


def test_a_checkpoint_of_before_early_stop_is_still_read(monkeypatch, tmp_path):
    train_on([3.0], monkeypatch, output_dir=str(tmp_path), max_steps=11)
    path = tmp_path / "checkpoint.pth"
    content = torch.load(path, weights_only=True)
    del content["evals_since_best"]
    torch.save(content, path)
    last = train_on([2.0, 1.0], monkeypatch, output_dir=str(tmp_path), resume=True)
    assert last["epoch"] == 2


def test_checkpoints_name_the_revision_of_the_start(monkeypatch, tmp_path):
    revisions = iter(["of the start", "of a later commit", "of another"])
    monkeypatch.setattr(session, "provenance", lambda: {"git": next(revisions)})
    last = train(ToyConfig(output_dir=str(tmp_path)))
    assert last["provenance"]["git"] == "of the start"
    first_line = (tmp_path / "config.yaml").read_text().splitlines()[0]
    assert json.loads(first_line.removeprefix("# "))["git"] == "of the start"


def test_a_sanity_check_comes_before_a_new_training_only(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(toy, "sanity", lambda models: calls.append(sorted(models)) or {})
    train(ToyConfig(output_dir=str(tmp_path), epochs=1))
    assert calls == [["", "ema_"]]
    train(ToyConfig(output_dir=str(tmp_path), epochs=2), resume=True)
    train(ToyConfig(val_sanity=False))
    assert len(calls) == 1


def test_a_sanity_check_does_not_change_the_run():
    with_check, without = train(ToyConfig()), train(ToyConfig(val_sanity=False))
    assert all(equal(with_check[name], without[name]) for name in with_check.keys() - {"args"})


def test_an_error_of_the_sanity_check_ends_the_run_before_the_first_step(monkeypatch, tmp_path):
    def fail(models):
        raise engine.UserError("the validation set is damaged")

    monkeypatch.setattr(toy, "sanity", fail)
    with pytest.raises(engine.UserError, match="is damaged"):
        train(ToyConfig(output_dir=str(tmp_path)))
    assert not (tmp_path / "checkpoint.pth").exists()


def test_the_log_begins_with_what_is_trained(caplog):
    caplog.set_level("INFO")
    train(ToyConfig(accumulate_steps=2, max_steps=7))
    lines = [
        "steps             5 per epoch, 7 in the run",
        "total batch size  8 images (1 process(es) x 4 x 2 accumulated)",
        "parameters        211 trainable of 211",
        "learning rate     0.05 (AdamW)",
        "dtype             float32",
    ]
    start = caplog.messages.index(lines[0])
    assert caplog.messages[start : start + len(lines)] == lines
    assert start < caplog.messages.index(next(m for m in caplog.messages if "epoch 0" in m))


def test_the_summary_of_an_epoch_is_one_short_line(caplog):
    caplog.set_level("INFO")
    train(ToyConfig(epochs=1))
    (line,) = [message for message in caplog.messages if "best" in message]
    assert line.startswith("epoch 0: mean ")
    assert len(line) < 90


class Crash(BaseException):
    """An error that nothing catches."""


@pytest.mark.parametrize("options", [{}, {"max_steps": 15}, {"eval_interval": 5}], ids=str)
@pytest.mark.parametrize("how", ["crash", "signal"])
def test_a_stop_in_an_evaluation_loses_nothing(monkeypatch, tmp_path, options, how):
    whole = train(ToyConfig(**options, output_dir=str(tmp_path / "whole")))
    evaluate = toy.evaluate
    calls = []

    def stop(models):
        calls.append(1)
        if len(calls) == (1 if "eval_interval" in options else 2):
            if how == "crash":
                raise Crash
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(models)

    monkeypatch.setattr(toy, "evaluate", stop)
    config = ToyConfig(**options, output_dir=str(tmp_path / "broken"))
    with pytest.raises(Crash if how == "crash" else engine.Stopped):
        train(config)
    again = "a step is trained again"
    monkeypatch.setattr(toy, "create_step", lambda *_: lambda *_: pytest.fail(again))
    resumed = train(config, resume=True)
    assert all(equal(whole[name], resumed[name]) for name in whole.keys() - {"args"})
    assert whole.keys() == resumed.keys()
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.txt").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    timed = {"train_images_per_s", "train_data_s", "train_memory_mb"}
    whole_log, log = (
        [{key: value for key, value in record.items() if key not in timed} for record in records]
        for records in logs
    )
    assert log == whole_log
    assert all(record.keys() >= timed for record in logs[1])


def test_a_new_run_does_not_replace_another_one(tmp_path):
    config = ToyConfig(output_dir=str(tmp_path), epochs=1)
    train(config)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    with pytest.raises(engine.UsageError, match="--auto-resume, replace it with --overwrite"):
        train(config)
    elsewhere = tmp_path / "elsewhere"
    train(config.model_copy(update={"output_dir": str(elsewhere), "seed": 1}))
    with pytest.raises(engine.UsageError, match="has the checkpoints of a run"):
        train(config.model_copy(update={"resume": str(elsewhere / "checkpoint.pth")}))
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    longer = {"epochs": 2, "resume": str(tmp_path / "checkpoint.pth")}
    assert train(config.model_copy(update=longer))["epoch"] == 1
    assert train(config.model_copy(update={"overwrite": True}))["epoch"] == 0


def test_overwrite_and_auto_resume_contradict_each_other():
    with pytest.raises(ValueError, match="--overwrite and --auto-resume exclude each other"):
        ToyConfig(output_dir="a", overwrite=True, auto_resume=True)


def test_a_training_that_saves_nothing_says_so(tmp_path, caplog):
    train(ToyConfig(epochs=1))
    assert "no --output_dir: this training saves neither checkpoints nor logs" in caplog.messages
    caplog.clear()
    train(ToyConfig(epochs=1, output_dir=str(tmp_path)))
    assert not any("output_dir" in message for message in caplog.messages)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_evaluation_with_metrics_that_are_not_finite_fails(tmp_path, value):
    config = ToyConfig(eval=True, output_dir=str(tmp_path))
    session = engine.start_session(config, lambda path: {})
    with pytest.raises(engine.UserError, match=f"loss must be finite, got {value}"):
        engine.run_evaluation(
            session, toy.create_model(0), lambda _: {"loss": value}, ema=None, num_images=3
        )
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize("entry", ["classes", "label_to_category"])
def test_a_training_whose_labels_mean_something_else_is_not_resumed(monkeypatch, tmp_path, entry):
    labels = {"classes": ["a", "b", "c"], "label_to_category": {0: 1, 1: 2, 2: 3}}
    extras = partial(engine.Recipe, checkpoint_extras=lambda: copy.deepcopy(labels))
    monkeypatch.setattr(engine, "Recipe", extras)
    config = ToyConfig(output_dir=str(tmp_path), epochs=2, max_steps=3)
    train(config)
    longer = config.model_copy(update={"max_steps": 5})
    assert train(longer, resume=True)["step"] == 5
    labels[entry][0], labels[entry][1] = labels[entry][1], labels[entry][0]
    with pytest.raises(engine.UserError, match=f"{entry} must be that of the checkpoint"):
        train(longer.model_copy(update={"max_steps": 7}), resume=True)
