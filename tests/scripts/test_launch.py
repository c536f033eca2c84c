"""The launchers start torchrun with the processes and nodes that their variables name."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SINGLE = "--nproc_per_node={} --standalone -m {}.main --config a.yaml --output_dir b c"
STUBS = {
    "torchrun": 'IFS=" "; echo "$*"',
    "scontrol": "echo node0; echo node1",
    "srun": 'for i in 0 1; do SLURM_NODEID=$i "$@"; done',
}


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder with commands that print what they are given."""
    for name, body in STUBS.items():
        add_command(tmp_path, name, body)
    return tmp_path


def add_command(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def launch(script: str, stubs: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a launcher with the stubs first on PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GPUS", "NODES")}
    return subprocess.run(
        ["bash", f"scripts/{script}", *flags],
        cwd=ROOT,
        env=kept | {"PATH": f"{stubs}:{os.environ['PATH']}"} | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("task", ["classification", "detection"])
@pytest.mark.parametrize(
    ("listed", "processes"),
    [
        ("echo 'GPU 0: H100 (UUID: a)'; echo 'GPU 1: H100 (UUID: b)'", 2),
        ("echo 'NVIDIA-SMI has failed'; exit 9", 1),
        ("exit 127", 1),
    ],
    ids=["two GPUs", "no driver", "no command"],
)
def test_one_process_is_started_per_gpu(task, listed, processes, stubs):
    add_command(stubs, "nvidia-smi", listed)
    done = launch(f"train_{task}.sh", stubs, "a.yaml", "--output_dir", "b c")
    assert done.stdout.strip() == SINGLE.format(processes, task)


def test_nodes_are_passed_to_torchrun(stubs):
    names = {"GPUS": "8", "NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}
    done = launch("train_detection.sh", stubs, "a.yaml", **names)
    nodes = "--nnodes=2 --node_rank=1 --master_addr=a --master_port=29500"
    expected = f"--nproc_per_node=8 {nodes} -m detection.main --config a.yaml"
    assert done.stdout.strip() == expected


def test_a_missing_rank_is_named(stubs):
    done = launch("train_detection.sh", stubs, "a.yaml", NODES="2", NODE_RANK="")
    assert done.returncode != 0
    assert "NODE_RANK must be set" in done.stderr


def test_without_a_configuration_the_usage_is_printed(stubs):
    done = launch("train_classification.sh", stubs)
    assert done.returncode == 2
    assert "scripts/launch.sh MODULE CONFIG" in done.stdout


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_slurm_starts_every_node_with_its_rank(task, stubs):
    variables = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    done = launch(f"slurm_{task}.sbatch", stubs, "a.yaml", "--output_dir", "b c", **variables)
    for rank, line in enumerate(done.stdout.splitlines()):
        nodes = f"--nnodes=2 --node_rank={rank} --master_addr=node0 --master_port=29500"
        flags = "--config a.yaml --output_dir b c --auto_resume"
        assert line == f"--nproc_per_node=8 {nodes} -m {task}.main {flags}"
    assert len(done.stdout.splitlines()) == 2
