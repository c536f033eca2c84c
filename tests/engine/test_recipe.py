"""A recipe in a session: what is refused, and what every checkpoint contains."""

import json

import pytest
import torch

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
