"""Processes: the environment of their launcher, their devices and their collectives."""

import pytest
import torch

from engine import UsageError, distributed, init_distributed
from engine.launcher import launched_as

LAUNCHERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID",
)  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)

    def environment(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return environment


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def gpus(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return gpus


SLURM = {"SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_STEP_NUM_TASKS": 8}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": 9, "LOCAL_RANK": 1, "WORLD_SIZE": 16}, (9, 1, 16)),
        (SLURM, (5, 1, 8)),
        (SLURM | {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}, (0, 0, 2)),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 8}, (0, 0, 1)),
    ],
    ids=["nothing", "torchrun", "srun", "torchrun in srun", "batch script"],
)
def test_the_launcher_is_recognized(environment, values, expected):
    environment(**values)
    assert launched_as() == expected


def test_a_single_process_has_no_group_and_its_collectives_return_its_value(environment):
    device = init_distributed("cpu")
    assert device == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_reduce_sum(torch.tensor(3.0)) == 3
    assert distributed.max_over_processes(-4) == -4
    assert distributed.broadcast_object("x") == "x"
    assert [distributed.any_process(flag) for flag in (True, False)] == [True, False]
    assert distributed.any_process(torch.tensor(True))
    assert not distributed.any_process_later(torch.tensor(False))()
    distributed.barrier()
    distributed.shutdown()


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:x", "mps", ""])
def test_an_unknown_device_is_an_error(environment, gpus, device):
    gpus(2)
    with pytest.raises(UsageError, match=f"must be auto, cpu, cuda or cuda:N, got '{device}'"):
        init_distributed(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_without_a_gpu_is_an_error(environment, gpus, device):
    gpus(0)
    with pytest.raises(UsageError, match=r"needs GPU 0, but torch finds 0 .*--device cpu"):
        init_distributed(device)


def test_auto_selects_a_gpu_if_there_is_one(environment, gpus, monkeypatch):
    gpus(0)
    assert init_distributed("auto").type == "cpu"
    gpus(2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert init_distributed("auto") == torch.device("cuda", 0)
    assert init_distributed("cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_more_processes_than_gpus_are_an_error(environment, gpus):
    gpus(2)
    environment(RANK=2, LOCAL_RANK=2, WORLD_SIZE=4)
    with pytest.raises(UsageError, match="needs GPU 2, but torch finds 2"):
        init_distributed("cuda")


def test_one_gpu_for_several_processes_is_an_error(environment, gpus):
    gpus(2)
    environment(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2)
    with pytest.raises(UsageError, match=r"must be .* cuda with 2 processes, got 'cuda:1'"):
        init_distributed("cuda:1")


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({"SLURM_JOB_ID": 123456}, "tcp://127.0.0.1:23456"),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": 77, "SLURM_STEP_NUM_NODES": 2}, "tcp://node1:77"),
    ],
    ids=["one node", "two nodes"],
)
def test_slurm_processes_connect_to_the_first_node(environment, monkeypatch, values, url):
    environment(**SLURM, **values)
    asked, options = [], {}
    store = torch.distributed.HashStore()
    monkeypatch.setattr(
        torch.distributed, "rendezvous", lambda *a: iter([asked.append(a) or (store, *a[1:])])
    )
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **o: options.update(o))
    monkeypatch.setattr(distributed, "_members", list)
    init_distributed("cpu")
    assert asked == [(url, 5, 8)]
    assert options.pop("store").underlying_store is store
    assert options == {"backend": "gloo", "rank": 5, "world_size": 8}


def test_several_slurm_nodes_without_master_addr_are_an_error(environment):
    environment(**SLURM, SLURM_STEP_NUM_NODES=2)
    with pytest.raises(UsageError, match=r"MASTER_ADDR must be set .*: export MASTER_ADDR"):
        init_distributed("cpu")


def test_collectives_return_the_same_in_both_processes(pair):
    for rank, results in enumerate(pair.results):
        got = results["collectives"]
        assert got["place"] == [rank, 2, rank == 0]
        assert got["sum"] == [2.0, 1.0]
        assert got["max"] == 10
        assert got["any"] == [True, False, True]
        assert got["object"] == {"from": 0}
        assert got["objects"] == [{"from": 0}, {"from": 1}]


def test_processes_with_other_measurements_choose_the_same_attention(pair):
    choices = [result["attention_choices"] for result in pair.results]
    assert choices[0] == choices[1]
    assert choices[0][0] in ("composed", "triton/rows")
    assert choices[0][1:] == ["composed", "triton/rows"]


def test_an_output_folder_local_to_a_node_resumes_from_that_of_the_main_process(pair):
    for rank, results in enumerate(pair.results):
        assert results["local_folders"] == {"found": [rank == 0] * 2, "equal": True}
