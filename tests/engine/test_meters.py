"""Meters: exact averages, fetched on demand, and the same in every process."""

import time

import pytest
import torch

from engine import Meters, Throughput, peak_memory_mb

CPU = torch.device("cpu")


def test_averages_are_weighted_by_the_number_of_items():
    meters = Meters(CPU)
    meters.update({"loss": torch.tensor(1.0), "acc": torch.tensor(0.0)}, n=3)
    meters.update({"acc": torch.tensor(1.0), "loss": torch.tensor(5.0)}, n=1)
    assert meters.averages() == {"loss": 2.0, "acc": 0.25}


def test_recent_averages_contain_the_updates_since_the_last_call():
    meters = Meters(CPU)
    for value in (1.0, 3.0):
        meters.update({"loss": torch.tensor(value)})
    assert meters.averages(recent=True) == {"loss": 2.0}
    assert meters.averages(recent=True) == {}
    meters.update({"loss": torch.tensor(8.0)})
    assert meters.averages(recent=True) == {"loss": 8.0}
    assert meters.averages() == {"loss": 4.0}


def test_sums_of_counts_stay_exact():
    meters = Meters(CPU)
    for _ in range(3):
        meters.add_sums({"correct": torch.tensor(1)}, n=3)
    assert meters.averages() == {"correct": 3 / 9}


def test_small_updates_are_not_lost_in_a_large_sum():
    meters = Meters(CPU)
    meters.add_sums({"loss": torch.tensor(2.0**25)}, n=0)
    for _ in range(64):
        meters.update({"loss": torch.tensor(1.0)})
    meters.add_sums({"loss": torch.tensor(-(2.0**25))}, n=0)
    assert meters.averages() == {"loss": 1.0}  # A float32 sum would lose all of them.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_any_type_is_summed_together_with_float32(dtype):
    meters = Meters(CPU)
    meters.update({"a": torch.tensor(3, dtype=dtype), "b": torch.tensor([0.5])})
    assert meters.averages() == {"a": 3.0, "b": 0.5}


def test_values_are_detached():
    meters = Meters(CPU)
    loss = torch.ones((), requires_grad=True) * 2
    meters.update({"loss": loss})
    assert not meters._sums.requires_grad


def test_an_update_does_not_fetch_from_the_device(monkeypatch):
    meters = Meters(CPU)
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    monkeypatch.setattr(torch.Tensor, "__float__", None)
    meters.update({"loss": torch.tensor(1.0)})


def test_other_names_than_before_are_an_error():
    meters = Meters(CPU)
    meters.update({"loss": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"names of values must be \['loss'\], got \['acc'\]"):
        meters.update({"acc": torch.tensor(1.0)})


def test_averages_are_over_both_processes(pair):
    for rank, results in enumerate(pair.results):
        got = results["collectives"]
        assert got["own"] == {"loss": rank, "acc": 0.5}
        assert got["all"] == {"loss": 0.75, "acc": 0.5}


def test_averages_include_processes_without_updates(pair):
    for results in pair.results:
        assert results["collectives"]["updated_by_main"] == {"correct": 0.75}


def test_throughput_counts_images_per_second(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed = Throughput()
    speed.add(100)
    now[0] = 14.0
    assert speed.recent() == 25.0
    speed.add(100)
    now[0] = 15.0
    assert speed.recent() == 100.0
    assert speed.average() == 40.0


def test_peak_memory_on_the_cpu_is_that_of_the_process():
    assert 50 < peak_memory_mb(CPU) < 100_000
