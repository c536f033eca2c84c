"""The line of the last steps: short enough for a terminal, with what users look for."""

import logging

import pytest

from engine.meters import TimedBatches, TimeLeft
from engine.progress import Progress, short_metrics, step_line

# The metrics of DETR, which once did not fit into a line.
LOSSES = {"loss": 12.3456, "loss_ce": 0.512345, "loss_bbox": 0.0912345, "loss_giou": 0.4}
DETR = {
    "loss": 12.3456,
    "class_error": 45.1234,
    **{f"{name}_{layer}": value for name, value in LOSSES.items() for layer in range(5)},
    "grad_norm": 31.2,
    "lr": 1e-5,
    "images_per_s": 12.3456,
    "data_s": 0.2,
    "memory_mb": 12345.0,
}
LINE = step_line(DETR, ("loss", "class_error", "AP"), 16, [730, 4 * 86400 + 3 * 3600])


def test_the_line_of_detr_has_what_users_look_for_in_110_columns(caplog):
    assert LINE == (
        "loss 12.35  class_error 45.12  lr 1e-05  12.3 img/s  data 15%  left 12:10 (run 4d 03h)"
    )
    caplog.set_level(logging.INFO)
    with Progress("epoch 149", 7393, 6999) as progress:
        progress.advance()
        progress.show(LINE)
    assert caplog.messages == [f"epoch 149 7000/7393  {LINE}"]
    assert len(caplog.messages[0]) <= 110


@pytest.mark.parametrize("columns", [90, 115, 200])
def test_a_terminal_shows_one_line_whose_bar_gets_the_remaining_columns(
    monkeypatch, capsys, columns
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 50))
    with Progress("epoch 149", 7393, 6999) as progress:
        progress.advance()
        progress.show(LINE)
    last = capsys.readouterr().out.rstrip("\n").split("\r")[-1]
    assert last.startswith("epoch 149 7000/7393 |")
    assert len(last) <= columns
    assert last.endswith(f"| {LINE}") == (columns > 110)
    assert "data 15%" in last


def test_other_trainers_show_their_first_metrics():
    metrics = dict.fromkeys("abcdef", 1234.5)
    assert short_metrics(metrics) == "a 1234  b 1234  c 1234  d 1234"
    assert short_metrics(metrics, ["f", "missing", "b"]) == "f 1234  b 1234"
    line = step_line({"x": 0.5, "lr": 0.1, "images_per_s": 2000.4, "data_s": 0}, None, 8, [5])
    assert line == "x 0.5  lr 0.1  2000 img/s  data 0%  left 0:05"


def test_waiting_for_data_is_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def batches():
        for batch in range(3):
            now[0] += 2.0
            yield batch

    timed = TimedBatches(batches())
    assert next(timed) == 0
    now[0] += 10.0  # The step.
    assert list(timed) == [1, 2]
    assert timed.recent() == 6.0
    assert timed.recent() == 0.0
    assert timed.total() == 6.0


def test_the_time_left_counts_everything_since_the_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    left = TimeLeft(total=50, done=10)
    assert left.seconds(10) == 0
    now[0] += 60.0
    assert left.seconds(30) == 60.0  # 20 steps took a minute, and 20 are left.
