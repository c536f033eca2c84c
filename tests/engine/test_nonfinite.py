"""A loss that is not finite: its origin is found, the step is saved, and the run stops."""

from typing import Any

import pytest
import torch
from torch import nn

import engine
from engine import LoopOptions, NonFiniteLossError, RunLog, StopRequest, TrainState, make_scaler
from tests.engine.toy import equal

CPU = torch.device("cpu")


class Inverse(nn.Module):
    """A division by `scale`, which a test sets to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.scale


class Net(nn.Module):
    """A model that runs its modules in another order than it defines them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), Inverse(), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class FailingRun:
    """A run that gets a loss that is not finite at step 2 of epoch 3, by some change before it."""

    def __init__(self, tmp_path: Any, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.net = Net()
        model = torch.compile(self.net, backend="eager") if compiled else self.net
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.state = TrainState(model, optimizer, make_scaler(CPU, torch.float32), epoch=3)
        self.options = LoopOptions(device=CPU, steps=5, batch_size=6, output_dir=tmp_path)
        self.batches = list(torch.randn(5, 6, 5))
        self.saved_model: dict[str, torch.Tensor] = {}

    def train(self, step: Any = None, before_step_2: Any = lambda: None) -> str:
        def on_step() -> None:
            if self.state.step == 2:
                before_step_2()
                self.saved_model = {k: v.clone() for k, v in self.net.state_dict().items()}

        def plain_step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.state.model(batch).square().mean()}

        with pytest.raises(NonFiniteLossError) as caught:
            engine.train_epoch(
                step or plain_step,
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
    run = FailingRun(tmp_path, compiled)
    message = run.train(before_step_2=lambda: setattr(run.net.body[2], "scale", 0.0))
    assert "at epoch 3, step 2: the first output that is not finite is that of module " in message
    assert "of module body.2; batch and weights are in" in message
    assert str(tmp_path / "nonfinite_rank0.pth") in message


def test_the_report_has_the_state_before_the_step(tmp_path):
    run = FailingRun(tmp_path)
    run.train(before_step_2=lambda: setattr(run.net.body[2], "scale", 0.0))
    report = torch.load(tmp_path / "nonfinite_rank0.pth", weights_only=True)
    assert (report["epoch"], report["step"]) == (3, 2)
    assert report["seed"] == engine.derive_seed(0, 3, 2, 0)
    assert torch.equal(report["batch"], run.batches[2])
    assert equal(report["model"], run.saved_model)
    assert equal(dict(run.net.state_dict()), run.saved_model)
    assert not report["metrics"]["loss"].isfinite()
    assert "body.2" in report["culprit"]


def test_a_parameter_that_is_not_finite_is_named(tmp_path):
    run = FailingRun(tmp_path)
    message = run.train(before_step_2=lambda: run.net.body[0].bias.data.fill_(torch.inf))
    assert "parameter body.0.bias was not finite before the step" in message


def test_a_batch_that_is_not_finite_is_reported(tmp_path):
    run = FailingRun(tmp_path)
    run.batches[2][1, 3] = torch.nan
    assert "the loss is nan at epoch 3, step 2: the batch itself is not finite" in run.train()


def test_the_metrics_that_are_not_finite_are_named(tmp_path):
    run = FailingRun(tmp_path)

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        output = run.net(batch).square().mean()
        fine, bad = output, output / (0.0 if run.state.step == 2 else 1.0)
        return {"loss": fine + bad, "loss_fine": fine, "loss_bad": bad}

    message = run.train(step)
    assert "the outputs of all modules are finite" in message
    assert "but not these metrics: loss, loss_bad;" in message


def test_a_failure_that_does_not_repeat_is_reported(tmp_path):
    run = FailingRun(tmp_path)
    calls = []

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"loss": run.net(batch).sum() * (torch.nan if len(calls) == 3 else 1.0)}

    assert "all values were finite when the same step ran again" in run.train(step)


def test_the_second_run_draws_the_same_random_numbers(tmp_path):
    run = FailingRun(tmp_path)
    draws = []

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        draws.append(float(torch.rand(())))
        bad = torch.nan if run.state.step == 2 else 1.0
        return {"loss": run.net(batch.mul_(2)).sum() * bad}

    run.train(step)
    assert len(draws) == 4
    assert draws[3] == draws[2] != draws[1]


def test_nothing_is_saved_without_a_folder():
    run = FailingRun(None)
    run.batches[2][1, 3] = torch.nan
    assert run.train().endswith("the batch itself is not finite")


def test_hooks_are_removed(tmp_path):
    run = FailingRun(tmp_path)
    run.batches[2][1, 3] = torch.nan
    run.train()
    assert not any(module._forward_hooks for module in run.net.modules())


def test_two_processes_stop_together_and_the_one_with_nan_saves_a_report(pair):
    messages = [results["nonfinite"] for results in pair.results]
    bad = next(rank for rank in range(2) if "the batch itself is not finite" in messages[rank])
    assert "the loss of another process is not finite at epoch 0" in messages[1 - bad]
    reports = sorted(path.name for path in (pair.folder / "nonfinite").glob("nonfinite*"))
    assert reports == [f"nonfinite_rank{bad}.pth"]
