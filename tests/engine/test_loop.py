"""The training loop: exact resumption at any step, and the effect of every option."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parameters_to_vector

import engine
from engine import LoopOptions, RunLog, StopRequest, TrainState, loop, make_scaler, train_epoch
from scripts.benchmark.host_syncs import OperatorCounter
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
        {"ema_warmup": True},
    ],
    ids=["plain", "workers", "accumulation", "bfloat16", "float16", "no clipping", "EMA warm-up"],
)
@pytest.mark.parametrize("place", [(0, 1), (1, 2)], ids=["first epoch", "second epoch"])
def test_a_run_resumed_within_an_epoch_equals_an_uninterrupted_one(tmp_path, options, place):
    uninterrupted = train(ToyConfig(**options))
    with pytest.raises(engine.Stopped):
        train(ToyConfig(**options, output_dir=str(tmp_path), kill_at=(SIGTERM, *place)))
    halfway = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (halfway["epoch"], halfway["step"]) == (place[0] - 1, place[1])
    assert not equal(halfway["model"], uninterrupted["model"])
    resumed = train(ToyConfig(**options, output_dir=str(tmp_path)), resume=True)
    assert_same_run(uninterrupted, resumed)


def test_runs_are_equal_for_the_same_seed_only():
    assert_same_run(train(ToyConfig()), train(ToyConfig()))
    assert not equal(train(ToyConfig())["model"], train(ToyConfig(seed=1))["model"])


def test_a_stop_at_the_last_step_of_an_epoch_resumes_after_it(tmp_path):
    uninterrupted = train(ToyConfig())
    with pytest.raises(engine.Stopped):
        train(ToyConfig(output_dir=str(tmp_path), kill_at=(SIGTERM, 0, 11)))
    resumed = train(ToyConfig(output_dir=str(tmp_path)), resume=True)
    assert_same_run(uninterrupted, resumed)


def test_a_killed_run_resumes_from_its_checkpoint_within_the_epoch(tmp_path):
    options = {"output_dir": str(tmp_path), "checkpoint_steps": 2}
    flags = [f"--{name}={value}" for name, value in options.items()]
    run = start("tests.engine.toy", *flags, "--kill-at", str(SIGKILL), "1", "5")
    run.communicate(timeout=60)
    assert run.returncode == -SIGKILL
    halfway = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (halfway["epoch"], halfway["step"]) == (0, 4)
    assert_same_run(train(ToyConfig()), train(ToyConfig(**options), resume=True))


@pytest.mark.parametrize(
    ("max_steps", "place", "lines"),
    [(5, (-1, 5), [0]), (11, (0, 0), [0]), (15, (0, 4), [0, 1])],
    ids=["first epoch", "end of an epoch", "second epoch"],
)
def test_max_steps_ends_training_with_evaluation_and_checkpoint(
    tmp_path, caplog, max_steps, place, lines
):
    options = {"output_dir": str(tmp_path), "eval_interval": 100, "checkpoint_steps": 4}
    last = train(ToyConfig(**options, max_steps=max_steps))
    assert (last["epoch"], last["step"]) == place
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert_same_run(last, saved)
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in log] == lines
    assert ["test_mean" in record for record in log] == [False] * (len(lines) - 1) + [True]
    # Only whole epochs have numbered checkpoints.
    assert (tmp_path / "checkpoint_0001.pth").exists() is False
    caplog.set_level("INFO")
    again = train(ToyConfig(**options, max_steps=max_steps), resume=True)
    assert f"the run is complete: it has {max_steps} steps" in caplog.messages
    assert_same_run(last, again)


def test_a_run_continued_after_max_steps_equals_an_uninterrupted_one(tmp_path):
    uninterrupted = train(ToyConfig())
    train(ToyConfig(output_dir=str(tmp_path), max_steps=5))
    train(ToyConfig(output_dir=str(tmp_path), max_steps=14), resume=True)
    resumed = train(ToyConfig(output_dir=str(tmp_path)), resume=True)
    # The evaluations in between may have the best metric.
    for name in uninterrupted.keys() - {"args", "best", "evals_since_best"}:
        assert equal(uninterrupted[name], resumed[name]), name
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [0, 1]


def test_max_steps_beyond_the_epochs_changes_nothing():
    assert_same_run(train(ToyConfig()), train(ToyConfig(max_steps=1000)))


def test_two_processes_stop_together_and_resume_exactly(pair):
    for results in pair.results:
        got = results["resumption"]
        assert got["code"] == 143
        assert got["halfway"] == [0, 2]
        assert got["equal"]
        assert got["moved"]
        assert got["limited"] == [-1, 3]
        # The second evaluation is not better than the first.
        assert got["early_stop"] == 1
    assert pair.results[0]["resumption"]["weights"] == pair.results[1]["resumption"]["weights"]


class LinearRun:
    """A linear model, and the other arguments of `train_epoch`; nothing in it is random."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(5, 3).double()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.state = TrainState(self.model, optimizer, make_scaler(CPU, torch.float32))
        self.options = LoopOptions(**({"device": CPU, "steps": 4, "batch_size": 6} | options))

    def step(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.state.model(batch).square().mean()}

    def train(self, loader: Any, step: Callable[..., Any] | None = None, **others: Any) -> Any:
        keywords = {"stop": StopRequest(), "log": RunLog(None)} | others
        return train_epoch(step or self.step, loader, self.state, self.options, **keywords)


def batches(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(count * size, 5, dtype=torch.float64, generator=generator)
    return list(data.split(size))


def test_accumulation_equals_the_large_batch():
    large, small = LinearRun(), LinearRun(accumulate=3, batch_size=2)
    expected = large.train(batches(4, 6))
    metrics = small.train(batches(12, 2))
    torch.testing.assert_close(small.model.weight, large.model.weight, rtol=0, atol=1e-14)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-12)


def test_gradients_are_synchronized_only_in_the_last_backward_pass_of_a_step():
    run = LinearRun(accumulate=3, steps=2)
    backward_passes = []
    without_sync = [False]

    class Distributed(nn.Linear):
        @contextmanager
        def no_sync(self):
            without_sync[0] = True
            yield
            without_sync[0] = False

    model = Distributed(5, 3).double()
    model.weight.register_hook(lambda gradient: backward_passes.append(without_sync[0]))
    run.state.model = model
    run.train(batches(6, 2))
    assert backward_passes == [True, True, False, True, True, False]


def test_the_loss_is_read_after_the_backward_pass_and_before_the_optimizer_step(monkeypatch):
    """So a GPU has the backward pass to do while the host waits for the loss."""
    run = LinearRun(accumulate=2, steps=2)
    events = []
    later = loop.any_process_later
    run.model.weight.register_hook(lambda gradient: events.append("backward"))
    run.state.optimizer.register_step_pre_hook(lambda *_: events.append("optimizer"))

    def any_process_later(flag: torch.Tensor) -> Callable[[], bool]:
        answer = later(flag)
        return lambda: events.append("read") or answer()

    monkeypatch.setattr(loop, "any_process_later", any_process_later)
    run.train(batches(4, 3))
    assert events == ["backward", "read", "backward", "read", "optimizer"] * 2


@pytest.mark.parametrize("clip", [1e-3, 1e3], ids=["small", "large"])
def test_clipping_bounds_the_norm_of_the_update(clip):
    run = LinearRun(steps=1, clip_grad=clip)
    before = parameters_to_vector(run.model.parameters()).detach().clone()
    metrics = run.train(batches(1, 6))
    after = parameters_to_vector(run.model.parameters()).detach()
    norm = float((after - before).norm() / 0.1)
    assert norm == pytest.approx(min(clip, metrics["grad_norm"]), rel=1e-4)
    assert 1e-3 < metrics["grad_norm"] < 1e3


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_forward_pass_computes_in_the_chosen_type(name):
    dtype = engine.DTYPES[name]
    run = LinearRun(dtype=dtype, steps=2)
    run.state.model = run.model.float()
    run.state.scaler = make_scaler(CPU, dtype)
    seen = set()

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        output = run.model(batch.float())
        seen.add(output.dtype)
        return {"loss": output.float().square().mean()}

    before = run.model.weight.detach().clone()
    run.train(batches(2, 6), step)
    assert seen == {dtype}
    assert not torch.equal(run.model.weight, before)
    assert run.state.scaler.is_enabled() == (name == "float16")


def test_every_forward_pass_has_its_own_seed_whatever_was_drawn_before():
    draws: dict[int, list[float]] = {}
    for noise in (0, 5):
        run = LinearRun(accumulate=2)
        run.state.epoch = 3
        drawn = draws.setdefault(noise, [])

        def step(batch: Any, run=run, drawn=drawn, noise=noise) -> Any:
            drawn.append(float(torch.rand(())))
            torch.rand(noise)
            return run.step(batch)

        run.train(batches(8, 2), step)
    assert draws[0] == draws[5]
    assert len(set(draws[0])) == 8
    torch.manual_seed(engine.derive_seed(0, 3, 5, 0))
    assert draws[0][5] == float(torch.rand(()))


def test_on_step_is_called_after_each_step_and_save_when_due():
    run = LinearRun(steps=7, checkpoint_steps=3)
    calls: list[tuple[str, int]] = []
    run.train(
        batches(7, 6),
        on_step=lambda: calls.append(("step", run.state.step)),
        save=lambda: calls.append(("save", run.state.step)),
    )
    assert [step for name, step in calls if name == "step"] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for name, step in calls if name == "save"] == [3, 6]
    assert calls.index(("save", 3)) == calls.index(("step", 3)) + 1


def test_batches_after_the_last_full_step_are_not_used():
    run = LinearRun(steps=2, accumulate=2)
    run.train(batches(5, 6))
    assert run.state.step == 2


def test_a_loader_that_ends_early_is_an_error():
    with pytest.raises(RuntimeError, match="the loader ended at step 3 of 4"):
        LinearRun().train(batches(3, 6))


def test_a_trained_epoch_reads_no_data():
    run = LinearRun()
    run.state.step = 4
    assert run.train(None) == {}


def test_a_step_may_change_its_batch_but_not_that_of_the_loader():
    data = batches(4, 6)
    before = [batch.clone() for batch in data]
    run = LinearRun()
    run.train(data, lambda batch: run.step(batch.mul_(0)))
    assert equal(data, before)


def test_metrics_are_averages_fetched_only_when_printed(monkeypatch):
    fetched = []
    averages = engine.Meters.averages
    monkeypatch.setattr(
        engine.Meters,
        "averages",
        lambda self, **options: fetched.append(run.state.step) or averages(self, **options),
    )
    run = LinearRun(steps=7, print_freq=3)
    losses = []

    def step(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        metrics = run.step(batch)
        losses.append(float(metrics["loss"].detach()))
        return metrics | {"seen": torch.tensor(len(losses))}

    metrics = run.train(batches(7, 6), step)
    assert fetched == [3, 6, 7, 7]
    assert metrics["loss"] == pytest.approx(sum(losses) / 7)
    assert metrics["seen"] == 4
    assert metrics["lr"] == 0.1
    assert metrics["images_per_s"] > 0
    assert metrics["data_s"] >= 0
    assert metrics["memory_mb"] > 0


def test_the_host_waits_only_for_the_loss_between_printed_metrics():
    run = LinearRun(steps=5, clip_grad=1.0, print_freq=4)
    waits = []

    def data() -> Iterator[torch.Tensor]:
        for batch in batches(5, 6):
            waits.append(counter.syncs.copy())
            yield batch

    ema = ModelEmaV3(run.model)
    with OperatorCounter() as counter:
        run.train(data(), on_step=lambda: ema.update(run.model))
    steps = [after - before for before, after in pairwise(waits)]
    assert steps[:3] == [{"_local_scalar_dense": 1}] * 3
    assert steps[3] == {"_local_scalar_dense": 1, "tolist": 1}


def test_curves_are_averages_since_the_last_point():
    points: list[tuple[int, float]] = []

    class Log(RunLog):
        def scalars(self, values: Any, step: int) -> None:
            assert values.keys() >= {"train/loss", "train/lr", "train/images_per_s"}
            points.append((step, values["train/seen"]))

    run = LinearRun(steps=5, print_freq=2)
    run.state.epoch = 2
    count = iter(range(1, 6))
    run.train(
        batches(5, 6),
        lambda batch: run.step(batch) | {"seen": torch.tensor(next(count))},
        log=Log(None),
    )
    assert points == [(12, 1.5), (14, 3.5), (15, 5.0)]


def test_the_time_of_a_slow_loader_is_a_metric():
    def slow():
        for batch in batches(4, 6):
            time.sleep(0.05)
            yield batch

    metrics = LinearRun().train(slow())
    assert 0.05 <= metrics["data_s"] < 0.5


def test_the_model_is_in_training_mode():
    run = LinearRun()
    run.model.eval()
    run.train(batches(4, 6))
    assert run.model.training


def test_the_state_of_deit_and_detr_checkpoints_is_loaded():
    run = LinearRun()
    run.state.load_state_dict({"optimizer": run.state.optimizer.state_dict(), "epoch": 4})
    assert (run.state.epoch, run.state.step) == (5, 0)


def test_a_compiled_model_is_saved_without_prefixes():
    run = LinearRun()
    run.state.model = torch.compile(run.model, backend="eager")
    assert set(run.state.state_dict()["model"]) == {"weight", "bias"}


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    LinearRun(print_freq=2).train(batches(4, 6))
    starts = [message.split("  ")[0] for message in caplog.messages]
    assert starts == ["epoch 0 2/4", "epoch 0 4/4"]
    caplog.clear()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    LinearRun(print_freq=2).train(batches(4, 6))
    assert caplog.records == []
    assert "4/4" in capsys.readouterr().out


def test_a_step_gets_batches_of_nested_containers():
    run = LinearRun(steps=1)
    seen = []

    def step(batch: Any) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return {"loss": F.mse_loss(run.model(batch["x"]), torch.zeros(6, 3).double())}

    given = {"x": batches(1, 6)[0], "targets": [{"boxes": torch.ones(2, 4)}, "name", None]}
    run.train([given], step)
    assert equal(seen[0], given)
    assert seen[0]["targets"][0]["boxes"] is not given["targets"][0]["boxes"]
