"""Logs: handlers are set once, only the main process writes, each epoch has one line."""

import json
import logging
import signal
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import RunLog, setup_logging
from tests.engine.launch import start


@pytest.fixture
def restored():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield root
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def lines(folder, name="log.txt"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def curve(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_second_setup_does_not_repeat_log_lines(restored, tmp_path, capsys):
    others = list(restored.handlers)
    setup_logging(tmp_path)
    setup_logging(tmp_path)
    logging.getLogger("engine.somewhere").info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "run.log").read_text().count("once") == 1
    assert [handler for handler in restored.handlers if handler in others] == others


def test_other_processes_only_show_warnings_with_their_rank(restored, tmp_path, capsys):
    setup_logging(tmp_path, rank=3)
    logging.getLogger("engine.somewhere").info("some info")
    logging.getLogger("engine.somewhere").warning("some warning")
    out = capsys.readouterr().out
    assert "some info" not in out
    assert "[rank 3] some warning" in out
    assert not (tmp_path / "run.log").exists()


def test_only_the_main_process_of_two_logs_and_writes(pair):
    main, other = pair.stdout
    assert "info of rank 0" in main
    assert "warning of rank 0" in main
    assert "info of rank 1" not in other
    assert "[rank 1] warning of rank 1" in other
    assert "epoch 0 " in main
    assert "epoch 0 " not in other
    events = list((pair.folder / "stopped" / "tensorboard").iterdir())
    assert len(events) == 2  # The main process wrote one before the stop and one after it.
    text = (pair.folder / "run.log").read_text()
    assert "info of rank 0" in text
    assert "of rank 1" not in text


def test_an_epoch_is_a_json_line_and_its_test_metrics_are_curves(tmp_path):
    with RunLog(tmp_path) as log:
        log.scalars({"train/loss": 3.0}, 5)
        log.scalars({"train/loss": 2.0}, 10)
        log.write_epoch({"epoch": 0, "train_loss": 2.5, "test_acc1": 50.0, "n_parameters": 7}, 10)
    assert lines(tmp_path) == [
        {"epoch": 0, "train_loss": 2.5, "test_acc1": 50.0, "n_parameters": 7}
    ]
    assert curve(tmp_path, "train/loss") == [(5, 3.0), (10, 2.0)]
    assert curve(tmp_path, "test/acc1") == [(10, 50.0)]


def test_a_resumed_run_keeps_old_lines_and_replaces_those_of_repeated_epochs(tmp_path):
    with RunLog(tmp_path) as log:
        for epoch in range(3):
            log.write_epoch({"epoch": epoch, "test_acc1": epoch}, 10 * epoch + 10)
    with RunLog(tmp_path, start_step=20) as log:  # Resume after epoch 1.
        log.write_epoch({"epoch": 2, "test_acc1": 9}, 30)
        log.write_epoch({"epoch": 3, "test_acc1": 3}, 40)
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert lines(tmp_path)[2]["test_acc1"] == 9
    assert curve(tmp_path, "test/acc1") == [(10, 0.0), (20, 1.0), (30, 9.0), (40, 3.0)]


def test_an_incomplete_line_after_a_crash_does_not_affect_others(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epo')
    with RunLog(tmp_path, start_step=10) as log:
        log.write_epoch({"epoch": 1}, 20)
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n{"epo\n{"epoch": 1}\n'


def test_a_new_run_renames_the_log_of_an_earlier_one(tmp_path):
    for run in range(3):
        with RunLog(tmp_path) as log:
            log.write_epoch({"epoch": 0, "run": run}, 10)
    assert lines(tmp_path) == [{"epoch": 0, "run": 2}]
    assert lines(tmp_path, "log.1.txt") == [{"epoch": 0, "run": 0}]
    assert lines(tmp_path, "log.2.txt") == [{"epoch": 0, "run": 1}]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None) as log:
        log.scalars({"train/loss": 3.0}, 5)
        log.write_epoch({"epoch": 0}, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_training_with_a_folder_outlives_its_console(tmp_path):
    flags = ["--epochs", "3", "--logger", "none", "--print-freq", "1", "--pause", "0.01"]
    run = start("tests.engine.toy", *flags, "--output-dir", str(tmp_path))
    run.stdout.readline()
    run.stdout.close()
    assert run.wait(timeout=60) == 0
    assert run.stderr.read() == ""
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3
    text = (tmp_path / "run.log").read_text()
    assert text.count("the console is closed (Broken pipe): the run continues") == 1
    assert "epoch 2 11/11" in text


def test_a_signal_stops_a_run_whose_console_is_closed(tmp_path):
    run = start("tests.engine.toy", "--output-dir", str(tmp_path), "--pause", "0.1")
    run.stdout.readline()
    run.stdout.close()
    run.stderr.close()
    while "epoch 0" not in (tmp_path / "run.log").read_text():
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 143
    assert torch.load(tmp_path / "checkpoint.pth")["step"] > 0
