"""A loss that is not finite: the right culprit, everything needed to see it again, then the end."""

from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine import LoopOptions, NonFiniteLossError, RunLog, StopRequest, TrainState, make_scaler
from tests.engine.toy import equal

CPU = torch.device("cpu")


class Inverse(nn.Module):
    """Divides by a number that somebody may set to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.scale


class Net(nn.Module):
    """Defines its modules in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), Inverse(), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Trouble:
    """A run on which something goes wrong at step 2 of epoch 3."""

    def __init__(self, tmp_path: Any, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.net = Net()
        model = torch.compile(self.net, backend="eager") if compiled else self.net
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.state = TrainState(model, optimizer, make_scaler(CPU, torch.float32), epoch=3)
        self.options = LoopOptions(device=CPU, steps=5, batch_size=6, output_dir=tmp_path)
        self.batches = list(torch.randn(5, 6, 5))
        self.saved_model: dict[str, torch.Tensor] = {}

    def run(self, step: Any = None, at_step_2: Any = lambda: None) -> str:
        def on_step() -> None:
            if self.state.step == 2:
                at_step_2()
                self.saved_model = {k: v.clone() for k, v in self.net.state_dict().items()}

        def plain(batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.state.model(batch).square().mean()}

        with pytest.raises(NonFiniteLossError) as caught:
            engine.train_epoch(
                step or plain,
                self.batches,
                self.state,
                self.options,
                stop=StopRequest(),
                log=RunLog(None),
                on_step=on_step,
            )
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_first_module_in_order_of_execution_is_named(tmp_path, compiled):
    trouble = Trouble(tmp_path, compiled)
    said = trouble.run(at_step_2=lambda: setattr(trouble.net.body[2], "scale", 0.0))
    assert "at epoch 3, step 2: the first output that is not finite is that of module " in said
    assert "of module body.2; batch and weights are in" in said
    assert str(tmp_path / "nonfinite_rank0.pth") in said


def test_everything_is_saved_as_it_was_before_the_step(tmp_path):
    trouble = Trouble(tmp_path)
    trouble.run(at_step_2=lambda: setattr(trouble.net.body[2], "scale", 0.0))
    report = torch.load(tmp_path / "nonfinite_rank0.pth", weights_only=True)
    assert (report["epoch"], report["step"]) == (3, 2)
    assert report["seed"] == engine.derive_seed(0, 3, 2, 0)
    assert torch.equal(report["batch"], trouble.batches[2])
    assert equal(report["model"], trouble.saved_model)
    assert equal(dict(trouble.net.state_dict()), trouble.saved_model)
    assert not report["figures"]["loss"].isfinite()
    assert "body.2" in report["culprit"]


def test_a_spoiled_parameter_is_named(tmp_path):
    trouble = Trouble(tmp_path)
    said = trouble.run(at_step_2=lambda: trouble.net.body[0].bias.data.fill_(torch.inf))
    assert "parameter body.0.bias was not finite before the step" in said


def test_a_spoiled_batch_is_named(tmp_path):
    trouble = Trouble(tmp_path)
    trouble.batches[2][1, 3] = torch.nan
    assert "the loss is nan at epoch 3, step 2: the batch itself is not finite" in trouble.run()


def test_a_loss_that_fails_by_itself_is_named(tmp_path):
    trouble = Trouble(tmp_path)

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        output = trouble.net(batch).square().mean()
        fine, bad = output, output / (0.0 if trouble.state.step == 2 else 1.0)
        return {"loss": fine + bad, "loss_fine": fine, "loss_bad": bad}

    said = trouble.run(step)
    assert "every module's output is finite" in said
    assert "of the figures computed from them not loss, loss_bad;" in said


def test_a_failure_that_does_not_come_again_is_admitted(tmp_path):
    trouble = Trouble(tmp_path)
    calls = []

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"loss": trouble.net(batch).sum() * (torch.nan if len(calls) == 3 else 1.0)}

    assert "a second run of the same step was finite" in trouble.run(step)


def test_the_second_run_draws_the_same_random_numbers(tmp_path):
    trouble = Trouble(tmp_path)
    draws = []

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        draws.append(float(torch.rand(())))
        bad = torch.nan if trouble.state.step == 2 else 1.0
        return {"loss": trouble.net(batch.mul_(2)).sum() * bad}

    trouble.run(step)
    assert len(draws) == 4
    assert draws[3] == draws[2] != draws[1]


def test_nothing_is_saved_without_a_directory():
    trouble = Trouble(None)
    trouble.batches[2][1, 3] = torch.nan
    assert trouble.run().endswith("the batch itself is not finite")


def test_hooks_are_gone_afterwards(tmp_path):
    trouble = Trouble(tmp_path)
    trouble.batches[2][1, 3] = torch.nan
    trouble.run()
    assert not any(module._forward_hooks for module in trouble.net.modules())


def test_two_processes_stop_together_and_the_right_one_reports(pair):
    said = [answers["poison"] for answers in pair.answers]
    bad = next(rank for rank in range(2) if "the batch itself is not finite" in said[rank])
    assert "the loss of another process is not finite at epoch 0" in said[1 - bad]
    reports = sorted(path.name for path in (pair.folder / "poisoned").glob("nonfinite*"))
    assert reports == [f"nonfinite_rank{bad}.pth"]
