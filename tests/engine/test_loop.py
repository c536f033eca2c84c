"""The loop: exact resumption at any step, and every option doing what it says."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

import engine
from engine import LoopOptions, RunLog, StopRequest, TrainState, make_scaler, train_epoch
from tests.engine.launch import start
from tests.engine.toy import SIGKILL, SIGTERM, ToyConfig, equal, train

CPU = torch.device("cpu")


def assert_same_run(left: dict[str, Any], right: dict[str, Any]) -> None:
    for name in left.keys() - {"args"}:
        assert equal(left[name], right[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"accumulate_steps": 3, "samples": 71},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"clip_grad": None},
    ],
    ids=["plain", "workers", "accumulation", "bfloat16", "float16", "no clipping"],
)
@pytest.mark.parametrize("place", [(0, 1), (1, 2)], ids=["first epoch", "second epoch"])
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_an_unbroken_one(tmp_path, options, place):
    unbroken = train(ToyConfig(**options))
    with pytest.raises(engine.Stopped):
        train(ToyConfig(**options, output_dir=str(tmp_path), kill_at=(SIGTERM, *place)))
    halfway = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (halfway["epoch"], halfway["step"]) == (place[0] - 1, place[1])
    assert not equal(halfway["model"], unbroken["model"])
    resumed = train(ToyConfig(**options, output_dir=str(tmp_path)), resume=True)
    assert_same_run(unbroken, resumed)


def test_equality_of_runs_is_no_accident():
    assert_same_run(train(ToyConfig()), train(ToyConfig()))
    assert not equal(train(ToyConfig())["model"], train(ToyConfig(seed=1))["model"])


def test_a_stop_at_the_last_step_of_an_epoch_resumes_after_it(tmp_path):
    unbroken = train(ToyConfig())
    with pytest.raises(engine.Stopped):
        train(ToyConfig(output_dir=str(tmp_path), kill_at=(SIGTERM, 0, 11)))
    resumed = train(ToyConfig(output_dir=str(tmp_path)), resume=True)
    assert_same_run(unbroken, resumed)


def test_a_run_killed_outright_resumes_from_its_periodic_checkpoint(tmp_path):
    flags = {"output_dir": str(tmp_path), "checkpoint_steps": 2}
    words = [f"--{name}={value}" for name, value in flags.items()]
    run = start("tests.engine.toy", *words, "--kill-at", str(SIGKILL), "1", "5")
    run.communicate(timeout=60)
    assert run.returncode == -SIGKILL
    halfway = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (halfway["epoch"], halfway["step"]) == (0, 4)
    assert_same_run(train(ToyConfig()), train(ToyConfig(**flags), resume=True))


def test_two_processes_stop_together_and_resume_exactly(pair):
    for answers in pair.answers:
        got = answers["resumption"]
        assert got["code"] == 143
        assert got["halfway"] == [0, 2]
        assert got["equal"]
        assert got["moved"]
    assert pair.answers[0]["resumption"]["weights"] == pair.answers[1]["resumption"]["weights"]


class Setting:
    """A linear model without any randomness, and what `train_epoch` wants beside it."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(5, 3).double()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.state = TrainState(self.model, optimizer, make_scaler(CPU, torch.float32))
        self.options = LoopOptions(**({"device": CPU, "steps": 4, "batch_size": 6} | options))

    def step(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.state.model(batch).square().mean()}

    def run(self, loader: Any, step: Callable[..., Any] | None = None, **others: Any) -> Any:
        keywords = {"stop": StopRequest(), "log": RunLog(None)} | others
        return train_epoch(step or self.step, loader, self.state, self.options, **keywords)


def batches(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(count * size, 5, dtype=torch.float64, generator=generator)
    return list(data.split(size))


def test_accumulation_equals_the_large_batch():
    large, small = Setting(), Setting(accumulate=3, batch_size=2)
    figures = large.run(batches(4, 6))
    others = small.run(batches(12, 2))
    torch.testing.assert_close(small.model.weight, large.model.weight, rtol=0, atol=1e-14)
    assert others["loss"] == pytest.approx(figures["loss"], rel=1e-12)


def test_gradients_are_exchanged_only_in_the_last_backward_pass_of_a_step():
    setting = Setting(accumulate=3, steps=2)
    backward_passes = []
    held_back = [False]

    class Distributed(nn.Linear):
        @contextmanager
        def no_sync(self):
            held_back[0] = True
            yield
            held_back[0] = False

    model = Distributed(5, 3).double()
    model.weight.register_hook(lambda gradient: backward_passes.append(held_back[0]))
    setting.state.model = model
    setting.run(batches(6, 2))
    assert backward_passes == [True, True, False, True, True, False]


@pytest.mark.parametrize("clip", [1e-3, 1e3], ids=["tight", "loose"])
def test_clipping_bounds_the_norm_of_the_update(clip):
    setting = Setting(steps=1, clip_grad=clip)
    before = parameters_to_vector(setting.model.parameters()).detach().clone()
    figures = setting.run(batches(1, 6))
    after = parameters_to_vector(setting.model.parameters()).detach()
    norm = float((after - before).norm() / 0.1)
    assert norm == pytest.approx(min(clip, figures["grad_norm"]), rel=1e-4)
    assert 1e-3 < figures["grad_norm"] < 1e3


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_forward_pass_computes_in_the_chosen_type(name):
    dtype = engine.DTYPES[name]
    setting = Setting(dtype=dtype, steps=2)
    setting.state.model = setting.model.float()
    setting.state.scaler = make_scaler(CPU, dtype)
    seen = set()

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        output = setting.model(batch.float())
        seen.add(output.dtype)
        return {"loss": output.float().square().mean()}

    before = setting.model.weight.detach().clone()
    setting.run(batches(2, 6), step)
    assert seen == {dtype}
    assert not torch.equal(setting.model.weight, before)
    assert setting.state.scaler.is_enabled() == (name == "float16")


def test_every_forward_pass_has_a_seed_of_its_own_that_ignores_what_was_drawn_before():
    draws: dict[int, list[float]] = {}
    for noise in (0, 5):
        setting = Setting(accumulate=2)
        setting.state.epoch = 3
        drawn = draws.setdefault(noise, [])

        def step(batch: Any, setting=setting, drawn=drawn, noise=noise) -> Any:
            drawn.append(float(torch.rand(())))
            torch.rand(noise)
            return setting.step(batch)

        setting.run(batches(8, 2), step)
    assert draws[0] == draws[5]
    assert len(set(draws[0])) == 8
    torch.manual_seed(engine.derive_seed(0, 3, 5, 0))
    assert draws[0][5] == float(torch.rand(()))


def test_callbacks_come_after_each_step_and_every_few():
    setting = Setting(steps=7, checkpoint_steps=3)
    calls: list[tuple[str, int]] = []
    setting.run(
        batches(7, 6),
        on_step=lambda: calls.append(("step", setting.state.step)),
        save=lambda: calls.append(("save", setting.state.step)),
    )
    assert [step for name, step in calls if name == "step"] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for name, step in calls if name == "save"] == [3, 6]
    assert calls.index(("save", 3)) == calls.index(("step", 3)) + 1


def test_batches_beyond_the_last_whole_step_are_left_over():
    setting = Setting(steps=2, accumulate=2)
    setting.run(batches(5, 6))
    assert setting.state.step == 2


def test_a_loader_that_ends_early_is_an_error():
    with pytest.raises(RuntimeError, match="the loader ended at step 3 of 4"):
        Setting().run(batches(3, 6))


def test_an_epoch_that_is_trained_already_touches_no_data():
    setting = Setting()
    setting.state.step = 4
    assert setting.run(None) == {}


def test_a_step_may_change_its_batch_and_leaves_the_loader_s_alone():
    data = batches(4, 6)
    before = [batch.clone() for batch in data]
    setting = Setting()
    setting.run(data, lambda batch: setting.step(batch.mul_(0)))
    assert equal(data, before)


def test_figures_are_averages_fetched_only_when_printed(monkeypatch):
    fetched = []
    averages = engine.Meters.averages
    monkeypatch.setattr(
        engine.Meters,
        "averages",
        lambda self, **options: fetched.append(setting.state.step) or averages(self, **options),
    )
    setting = Setting(steps=7, print_freq=3)
    losses = []

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        figures = setting.step(batch)
        losses.append(float(figures["loss"].detach()))
        return figures | {"seen": torch.tensor(len(losses))}

    figures = setting.run(batches(7, 6), step)
    assert fetched == [3, 6, 7, 7]
    assert figures["loss"] == pytest.approx(sum(losses) / 7)
    assert figures["seen"] == 4
    assert figures["lr"] == 0.1
    assert figures["images_per_s"] > 0
    assert figures["memory_mb"] > 0


def test_curves_hold_the_figures_since_the_line_before():
    points: list[tuple[int, float]] = []

    class Log(RunLog):
        def scalars(self, values: Any, step: int) -> None:
            assert values.keys() >= {"train/loss", "train/lr", "train/images_per_s"}
            points.append((step, values["train/seen"]))

    setting = Setting(steps=5, print_freq=2)
    setting.state.epoch = 2
    count = iter(range(1, 6))
    setting.run(
        batches(5, 6),
        lambda batch: setting.step(batch) | {"seen": torch.tensor(next(count))},
        log=Log(None),
    )
    assert points == [(12, 1.5), (14, 3.5), (15, 5.0)]


def test_the_model_is_set_to_training():
    setting = Setting()
    setting.model.eval()
    setting.run(batches(4, 6))
    assert setting.model.training


def test_the_state_of_the_originals_is_understood():
    setting = Setting()
    setting.state.load_state_dict({"optimizer": setting.state.optimizer.state_dict(), "epoch": 4})
    assert (setting.state.epoch, setting.state.step) == (5, 0)


def test_a_compiled_or_distributed_model_is_saved_under_its_own_names():
    setting = Setting()
    setting.state.model = torch.compile(setting.model, backend="eager")
    assert set(setting.state.state_dict()["model"]) == {"weight", "bias"}


def test_a_terminal_shows_a_bar_and_anything_else_lines(monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    Setting(print_freq=2).run(batches(4, 6))
    assert [record.getMessage().split("  ")[:2] for record in caplog.records] == [
        ["epoch 0", "step 2/4"],
        ["epoch 0", "step 4/4"],
    ]
    caplog.clear()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    Setting(print_freq=2).run(batches(4, 6))
    assert caplog.records == []
    assert "4/4" in capsys.readouterr().out


def test_cross_entropy_of_mixed_batches_reaches_the_step_as_given():
    # Containers of every kind arrive with their tensors copied and all else untouched.
    setting = Setting(steps=1)
    seen = []

    def step(batch: Any) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return {"loss": F.mse_loss(setting.model(batch["x"]), torch.zeros(6, 3).double())}

    given = {"x": batches(1, 6)[0], "targets": [{"boxes": torch.ones(2, 4)}, "name", None]}
    setting.run([given], step)
    assert equal(seen[0], given)
    assert seen[0]["targets"][0]["boxes"] is not given["targets"][0]["boxes"]
