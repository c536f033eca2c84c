"""Results name the revision, the versions and the machine that computed them, but no host."""

import platform

import timm
import torch

from engine.provenance import _cpu_name, _version_of, machine, provenance


def test_provenance_names_versions_and_no_host():
    found = provenance()
    assert set(found) == {"git", "python", "torch", "cuda"}
    assert type(found["torch"]) is str
    assert found["git"] is None or len(found["git"].removesuffix("-dirty")) == 40


def test_machine_names_the_processor_the_threads_and_the_versions():
    found = machine()
    assert found == machine(torch.device("cpu"))
    assert found["device"]
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["timm"] == timm.__version__
    assert found["python"] == platform.python_version()


def test_machine_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine("cuda:1")["device"] == "GPU 1"


def test_missing_packages_have_no_version():
    assert _version_of("no-such-package") is None


def test_processor_is_named_by_the_system_or_by_its_architecture(tmp_path):
    info = tmp_path / "cpuinfo"
    architecture = platform.processor() or platform.machine()
    assert _cpu_name(info) == architecture
    info.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert _cpu_name(info) == architecture
    info.write_text("processor\t: 0\nmodel name\t: Some CPU: 8 cores\nmodel name\t: Other\n")
    assert _cpu_name(info) == "Some CPU: 8 cores"
