"""A recipe in a session: what is refused, and what every checkpoint contains."""

import json

import pytest
import torch

import engine
from engine import session
from tests.engine import toy
from tests.engine.toy import ToyConfig, train


def test_an_epoch_without_a_whole_step_is_refused():
    with pytest.raises(engine.UsageError, match=r"must be at most 44, .* got 9 x 5"):
        train(ToyConfig(batch_size=9, accumulate_steps=5))


def test_a_trainer_without_evaluation_refuses_to_evaluate():
    with pytest.raises(engine.UsageError, match="has no --eval"):
        train(ToyConfig(eval=True))


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
