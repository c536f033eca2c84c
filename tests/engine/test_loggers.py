"""Loggers: the calls of each client, continued runs, missing packages, failing services."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine
from engine import RunLog
from tests.commands import failure_of
from tests.engine import toy
from tests.engine.toy import ToyConfig, train

CONFIG = {"lr": 0.1, "name": "none", "pair": [1, 2]}
PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


class Wandb(SimpleNamespace):
    """The part of the package wandb that the logger calls; `calls` records it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        super().__init__(Image=lambda array: ("image", array.shape))

    def init(self, *, dir, name, config, id, resume, allow_val_change):
        self.calls.append(("init", (name, config, id, resume)))
        return SimpleNamespace(id=id or "new-id", log=self.log, finish=self.finish)

    def log(self, data, step):
        self.calls.append(("log", (data, step)))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


class Mlflow(SimpleNamespace):
    """The part of the package mlflow that the logger calls; `calls` records it."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def start_run(self, *, run_id, run_name):
        self.calls.append(("start_run", (run_id, run_name)))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "new-id"))

    def log_params(self, params):
        self.calls.append(("log_params", params))

    def log_metrics(self, metrics, step):
        self.calls.append(("log_metrics", (metrics, step)))

    def log_image(self, image, *, key, step):
        self.calls.append(("log_image", (image.shape, key, step)))

    def end_run(self, status):
        self.calls.append(("end_run", status))


@pytest.fixture(params=[Wandb, Mlflow], ids=["wandb", "mlflow"])
def client(request, monkeypatch):
    fake = request.param()
    fake.name = request.param.__name__.lower()
    monkeypatch.setitem(sys.modules, fake.name, fake)
    return fake


def write(folder, name, *, start_step=0, fail=False):
    with RunLog(folder, start_step=start_step, loggers=[name], config=CONFIG) as log:
        log.scalars({"train/loss": 2.0}, 5)
        log.images({"mistakes": [PICTURE, PICTURE]}, 5)
        log.write_epoch({"epoch": 0, "test_acc1": 50.0}, 5)
        if fail:
            raise engine.UserError("an error")


EXPECTED = {
    "wandb": [
        ("init", ("run", CONFIG, None, None)),
        ("log", ({"train/loss": 2.0}, 5)),
        ("log", ({"mistakes": [("image", (4, 5, 3))] * 2}, 5)),
        ("log", ({"test/acc1": 50.0}, 5)),
        ("finish", 0),
    ],
    "mlflow": [
        ("start_run", (None, "run")),
        ("log_params", CONFIG),
        ("log_metrics", ({"train/loss": 2.0}, 5)),
        ("log_image", ((4, 5, 3), "mistakes/0", 5)),
        ("log_image", ((4, 5, 3), "mistakes/1", 5)),
        ("log_metrics", ({"test/acc1": 50.0}, 5)),
        ("end_run", "FINISHED"),
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_client_gets_configuration_curves_and_pictures(client, folder):
    write(folder, client.name)
    assert client.calls == EXPECTED[client.name]
    assert not (folder / "tensorboard").exists()


def test_a_resumed_run_continues_the_run_of_the_service(client, folder):
    write(folder, client.name)
    assert json.loads((folder / "loggers.json").read_text()) == {client.name: "new-id"}
    client.calls.clear()
    write(folder, client.name, start_step=3)
    if client.name == "wandb":
        assert client.calls[0] == ("init", ("run", CONFIG, "new-id", "allow"))
    else:
        # The parameters of a run cannot be changed.
        assert client.calls[0] == ("start_run", ("new-id", "run"))
        assert "log_params" not in dict(client.calls)
    client.calls.clear()
    write(folder, client.name)
    assert client.calls[0] == EXPECTED[client.name][0]


def test_a_failed_run_is_marked(client, folder):
    with pytest.raises(engine.UserError):
        write(folder, client.name, fail=True)
    assert client.calls[-1] in [("finish", 1), ("end_run", "FAILED")]


def test_a_service_that_fails_does_not_end_the_run(client, folder, monkeypatch, caplog):
    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(client, "log" if client.name == "wandb" else "log_metrics", fail)
    write(folder, client.name)
    message = f"--logger {client.name} failed, the run continues without it: no route to host"
    assert caplog.messages == [message]
    assert (folder / "log.txt").read_text().count("\n") == 1


def test_a_service_that_refuses_the_run_is_one_line(client, folder, monkeypatch):
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(client, "init" if client.name == "wandb" else "start_run", fail)
    with pytest.raises(engine.UserError, match=f"--logger {client.name}: no API key"):
        write(folder, client.name)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_is_named_with_its_installation(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    argv = ["--output-dir", str(tmp_path), "--logger", name]
    code, line = failure_of(toy.main, argv, capsys)
    assert code == 1
    assert line == f"error: --logger {name} needs the package {name}: pip install {name}"
    assert not (tmp_path / "config.yaml").exists()


def test_training_needs_no_tensorboard_without_its_logger(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(ToyConfig(output_dir=str(tmp_path), logger=None, epochs=1))
    assert (tmp_path / "log.txt").exists()
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--logger neptune", "--logger must be tensorboard, wandb, mlflow, or several of them"),
        ("--logger wandb,wandb", "--logger must be tensorboard, wandb, mlflow, or several"),
        ("--logger wandb", "--logger wandb needs --output-dir"),
        ("--log-images 3", "--log-images needs --output-dir"),
        ("--log-images 3 --logger none --output-dir x", "--log-images needs --logger"),
    ],
)
def test_wrong_options_are_refused(capsys, argv, expected):
    code, line = failure_of(toy.main, argv.split(), capsys)
    assert code == 2
    assert expected in line


def test_tensorboard_has_the_configuration_and_pictures(folder):
    write(folder, "tensorboard")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    lr: 0.1\n    name: none\n    pair:\n    - 1\n    - 2\n"
    assert set(events.Tags()["images"]) == {"mistakes/0", "mistakes/1"}


def test_a_training_sends_its_configuration_to_all_of_its_loggers(monkeypatch, tmp_path):
    fakes = {"wandb": Wandb(), "mlflow": Mlflow()}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    train(ToyConfig(output_dir=str(tmp_path), logger="tensorboard,wandb,mlflow", epochs=1))
    assert (tmp_path / "tensorboard").exists()
    config = fakes["wandb"].calls[0][1][1]
    assert config["samples"] == 44
    assert fakes["mlflow"].calls[1] == ("log_params", config)
    steps = [call[1][1] for call in fakes["wandb"].calls if call[0] == "log"]
    assert steps == sorted(steps)
