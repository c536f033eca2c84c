"""Logs: handlers once, the main process alone writes, an epoch has one line whatever happens."""

import json
import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import RunLog, setup_logging


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


def test_setting_up_twice_says_everything_once(restored, tmp_path, capsys):
    others = list(restored.handlers)
    setup_logging(tmp_path)
    setup_logging(tmp_path)
    logging.getLogger("engine.somewhere").info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "run.log").read_text().count("once") == 1
    assert [handler for handler in restored.handlers if handler in others] == others


def test_another_process_only_warns_and_names_its_rank(restored, tmp_path, capsys):
    setup_logging(tmp_path, rank=3)
    logging.getLogger("engine.somewhere").info("chatter")
    logging.getLogger("engine.somewhere").warning("trouble")
    out = capsys.readouterr().out
    assert "chatter" not in out
    assert "[rank 3] trouble" in out
    assert not (tmp_path / "run.log").exists()


def test_of_two_processes_only_the_main_one_speaks_and_writes(pair):
    main, other = pair.stdout
    assert "said by 0" in main
    assert "warned by 0" in main
    assert "said by 1" not in other
    assert "[rank 1] warned by 1" in other
    assert "step" in main
    assert "step" not in other
    events = list((pair.folder / "stopped" / "tensorboard").iterdir())
    assert len(events) == 2  # of the main process, before the stop and after
    text = (pair.folder / "run.log").read_text()
    assert "said by 0" in text
    assert "by 1" not in text


def test_an_epoch_is_a_json_line_and_its_test_figures_are_curves(tmp_path):
    with RunLog(tmp_path) as log:
        log.scalars({"train/loss": 3.0}, 5)
        log.scalars({"train/loss": 2.0}, 10)
        log.write_epoch({"epoch": 0, "train_loss": 2.5, "test_acc1": 50.0, "n_parameters": 7}, 10)
    assert lines(tmp_path) == [
        {"epoch": 0, "train_loss": 2.5, "test_acc1": 50.0, "n_parameters": 7}
    ]
    assert curve(tmp_path, "train/loss") == [(5, 3.0), (10, 2.0)]
    assert curve(tmp_path, "test/acc1") == [(10, 50.0)]


def test_a_resumed_run_keeps_old_lines_and_never_doubles_an_epoch(tmp_path):
    with RunLog(tmp_path) as log:
        for epoch in range(3):
            log.write_epoch({"epoch": epoch, "test_acc1": epoch}, 10 * epoch + 10)
    with RunLog(tmp_path, start_step=20) as log:  # from the checkpoint after epoch 1
        log.write_epoch({"epoch": 2, "test_acc1": 9}, 30)
        log.write_epoch({"epoch": 3, "test_acc1": 3}, 40)
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert lines(tmp_path)[2]["test_acc1"] == 9
    assert curve(tmp_path, "test/acc1") == [(10, 0.0), (20, 1.0), (30, 9.0), (40, 3.0)]


def test_a_line_cut_by_a_crash_hurts_no_other(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epo')
    with RunLog(tmp_path, start_step=10) as log:
        log.write_epoch({"epoch": 1}, 20)
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n{"epo\n{"epoch": 1}\n'


def test_a_new_run_sets_the_log_of_an_older_one_aside(tmp_path):
    for run in range(3):
        with RunLog(tmp_path) as log:
            log.write_epoch({"epoch": 0, "run": run}, 10)
    assert lines(tmp_path) == [{"epoch": 0, "run": 2}]
    assert lines(tmp_path, "log.1.txt") == [{"epoch": 0, "run": 0}]
    assert lines(tmp_path, "log.2.txt") == [{"epoch": 0, "run": 1}]


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None) as log:
        log.scalars({"train/loss": 3.0}, 5)
        log.write_epoch({"epoch": 0}, 10)
    assert list(tmp_path.iterdir()) == []
