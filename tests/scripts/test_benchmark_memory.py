"""The computed memory of a recipe: its parts, and the effect of its options."""

import re

import pytest
import torch
from torch import nn

from scripts.benchmark.__main__ import main
from scripts.benchmark.memory import state_bytes, stored_bytes

CLASSIFIER = (
    "classification --model deit_tiny_patch16_224 --input_size 32 --embed_dim 24 --num_heads 2 "
    "--rpe rpe-1.9-product-ctx-1-k --batch_size 4"
)
DETECTOR = (
    "detection --backbone resnet18 --hidden_dim 32 --nheads 2 --dim_feedforward 32 --batch_size 4 "
    "--enc_rpe2d rpe-2.0-product-ctx-1-k --image_size 64"
)


def memory(flags: str, capsys: pytest.CaptureFixture) -> list[float]:
    """Return the numbers that the command prints: GiB of states, stored and in total."""
    main(["memory", *flags.split()])
    return [float(number) for number in re.findall(r"([\d.]+) GiB", capsys.readouterr().out)]


def test_the_stored_bytes_are_those_that_autograd_needs():
    model = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 3))
    # The inputs of both linear layers and the output of the sigmoid, which is the second of them.
    assert stored_bytes(model, torch.randn(2, 5), torch.float32) == 4 * 2 * (5 + 7)


@pytest.mark.parametrize(("ema", "copies"), [(False, 4), (True, 5)], ids=["plain", "EMA"])
def test_states_are_weights_gradients_two_moments_and_the_ema(ema, copies):
    model = nn.Linear(100, 100, bias=False)
    steps = 4
    expected = copies * 4 * 100 * 100 + steps
    assert state_bytes(model, torch.optim.AdamW(model.parameters()), ema) == expected


@pytest.mark.parametrize("flags", [CLASSIFIER, DETECTOR], ids=["classification", "detection"])
def test_checkpointing_lowers_the_memory_of_a_recipe(flags, capsys, monkeypatch):
    # The small models have less than 0.01 GiB.
    monkeypatch.setattr("scripts.benchmark.memory.GIB", 2**10)
    states, stored, total = memory(flags, capsys)
    less_states, less_stored, less_total = memory(f"{flags} --grad_checkpointing", capsys)
    assert states == less_states
    assert less_stored < 0.7 * stored
    assert total == pytest.approx(states + stored, abs=0.02)
    assert less_total < total


def test_an_unknown_task_or_option_is_refused(capsys):
    for argv, message in ((["speech"], "speech"), (["detection", "--lrr", "1"], "--lrr")):
        with pytest.raises(SystemExit) as leaving:
            main(["memory", *argv])
        assert leaving.value.code == 2
        assert message in capsys.readouterr().err
