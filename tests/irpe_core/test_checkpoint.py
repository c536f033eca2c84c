"""Reading checkpoints: ours, those of the originals, and never running code in a file."""

import argparse
import os
import pickle
import random
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from irpe_core import CheckpointError, load_checkpoint, load_weights

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def saved(path: Path, checkpoint: object, **options) -> Path:
    torch.save(checkpoint, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoints_of_the_originals_load_with_their_namespace_as_a_dict(tmp_path, zipped):
    args = argparse.Namespace(lr=5e-4, model="deit", opt_betas=None, sizes=[1, 2])
    checkpoint = {"model": STATE, "epoch": 299, "args": args, "optimizer": {"state": {}}}
    path = saved(tmp_path / "a.pth", checkpoint, _use_new_zipfile_serialization=zipped)
    for source in (path, str(path)):
        loaded = load_checkpoint(source)
        assert torch.equal(loaded["model"]["weight"], STATE["weight"])
        assert loaded["epoch"] == 299
        assert loaded["args"] == vars(args)


def test_a_bare_state_dict_becomes_the_model_entry(tmp_path):
    loaded = load_checkpoint(saved(tmp_path / "a.pth", STATE))
    assert set(loaded) == {"model"}
    assert torch.equal(loaded["model"]["bias"], STATE["bias"])


@pytest.mark.parametrize("where", ["args", "model", "whole", "inside-namespace"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, where, zipped):
    marker = tmp_path / "was-run"
    payload = Payload(marker)
    checkpoint = {
        "args": {"model": STATE, "args": payload},
        "model": {"model": payload},
        "whole": payload,
        "inside-namespace": {"model": STATE, "args": argparse.Namespace(device=payload)},
    }[where]
    path = saved(tmp_path / "a.pth", checkpoint, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"a\.pth' holds objects other than .*system.* not loaded$"
    ):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was-run"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pth").write_bytes(pickle.dumps(Payload(marker), protocol))
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "a.pth")
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.99, -1])
def test_the_error_of_a_truncated_file_says_so(tmp_path, share, zipped):
    path = saved(tmp_path / "a.pth", {"model": STATE}, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))] if share >= 0 else data[:-1])
    with pytest.raises(CheckpointError, match=r"a\.pth' is truncated or not a torch checkpoint$"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, world\n" * 20,
        b"<!DOCTYPE html><html>404</html>",
        b"\0" * 999,
        b"\x80\x02",
        b"(lp0\n.",
    ],
    ids=["text", "web-page", "zeros", "magic-only", "pickle-of-a-list"],
)
def test_a_file_of_another_kind_is_refused(tmp_path, data):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"not a torch checkpoint$|holds no weights"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_file_raises_only_checkpoint_errors(tmp_path, zipped):
    path = saved(tmp_path / "a.pth", {"model": STATE}, _use_new_zipfile_serialization=zipped)
    data, refused = path.read_bytes(), 0
    for seed in range(150):
        draw, damaged = random.Random(seed), bytearray(data)
        for _ in range(draw.randint(1, 20)):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "content", [{}, [STATE], {"model": STATE["bias"], "epoch": 1}, {"epoch": 1}, STATE["bias"]]
)
def test_the_error_of_a_file_without_weights_says_so(tmp_path, content):
    path = saved(tmp_path / "a.pth", content)
    with pytest.raises(CheckpointError, match=r"a\.pth' holds no weights: .* under 'model'$"):
        load_checkpoint(path)


def test_errors_of_a_missing_file_and_of_a_folder_differ(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth' does not exist"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_checkpoint(tmp_path)


def test_the_error_of_an_unreadable_file_gives_the_reason(tmp_path, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = saved(tmp_path / "a.pth", STATE)
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Permission denied"):
        load_checkpoint(path)


def test_weights_are_loaded_strictly_or_not_at_all():
    model = nn.Linear(3, 2)
    load_weights(model, STATE)
    assert torch.equal(model.weight, STATE["weight"])
    wrong = {
        "missing": {"weight": torch.zeros(2, 3)},
        "unexpected": {**STATE, "weight": torch.zeros(2, 3), "extra": torch.ones(1)},
        "shape": {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)},
        "kind": {"weight": torch.zeros(2, 3), "bias": 1.0},
    }
    messages = {
        "missing": "does not fit Linear: 1 missing: bias",
        "unexpected": "1 unexpected: extra",
        "shape": r"1 wrongly shaped: weight is \(2, 4\), the model's is \(2, 3\)",
        "kind": r"1 wrongly shaped: bias is not a tensor, the model's is \(2,\)",
    }
    for kind, state in wrong.items():
        with pytest.raises(CheckpointError, match=messages[kind]):
            load_weights(model, state)
        assert torch.equal(model.weight, STATE["weight"])
        assert torch.equal(model.bias, STATE["bias"])


def test_keys_that_differ_only_in_numbers_are_listed_as_one():
    with pytest.raises(CheckpointError, match=r"8 missing: \*\.weight, \*\.bias;"):
        load_weights(nn.Sequential(*[nn.Linear(1, 1) for _ in range(4)]), {})


def test_long_lists_of_keys_are_abridged():
    with pytest.raises(CheckpointError, match=r"5 unexpected: a, b, c and 2 more$"):
        load_weights(nn.Linear(3, 2), STATE | dict.fromkeys("abcde", torch.ones(1)))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix):
    wrapped = {prefix + key: value for key, value in STATE.items()}
    path = saved(tmp_path / "a.pth", {"model": wrapped, "model_ema": wrapped, "epoch": 3})
    loaded = load_checkpoint(path)
    assert loaded["model"].keys() == loaded["model_ema"].keys() == STATE.keys()
    assert load_checkpoint(saved(tmp_path / "b.pth", wrapped))["model"].keys() == STATE.keys()


def test_a_prefix_of_only_some_names_is_kept(tmp_path):
    mixed = STATE | {"module.weight": STATE["weight"]}
    assert load_checkpoint(saved(tmp_path / "a.pth", mixed))["model"].keys() == mixed.keys()


def test_safetensors_are_read_as_bare_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    loaded = load_checkpoint(path)
    assert loaded.keys() == {"model"}
    load_weights(nn.Linear(3, 2), loaded["model"])
    assert torch.equal(loaded["model"]["weight"], STATE["weight"])
    save_file({f"module.{key}": value for key, value in STATE.items()}, path, {"format": "pt"})
    assert load_checkpoint(str(path))["model"].keys() == STATE.keys()
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:30], b"not safetensors at all"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"truncated or not a safetensors file$"):
            load_checkpoint(path)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint(path)


def test_the_error_without_the_package_safetensors_names_it(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"a\.safetensors' needs the package safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["model", "model_ema"])
@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({1: STATE["weight"]}, "must have strings as names, got 1"),
        (STATE | {"bias": 3.0}, "must hold tensors, got a float under 'bias'"),
        (STATE | {"bias": None}, "must hold tensors, got a NoneType under 'bias'"),
        (STATE | {"bias": {"a": STATE["bias"]}}, "must hold tensors, got a dict under 'bias'"),
    ],
    ids=["key", "number", "none", "nested"],
)
def test_weights_that_are_not_tensors_are_refused(tmp_path, name, weights, fault):
    path = saved(tmp_path / "a.pth", {"model": STATE, "epoch": 1} | {name: weights})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"{name!r} of {str(path)!r} {fault}"


def test_an_ema_of_another_type_is_refused_and_may_be_none(tmp_path):
    path = saved(tmp_path / "a.pth", {"model": STATE, "model_ema": [STATE]})
    with pytest.raises(
        CheckpointError, match=r"'model_ema' of .* must be a dict of tensors, got a list"
    ):
        load_checkpoint(path)
    path = saved(tmp_path / "b.pth", {"model": STATE, "model_ema": None, "args": None})
    assert load_checkpoint(path)["model_ema"] is None


@pytest.mark.parametrize("args", [["--lr", "1"], "lr", 0, STATE["bias"]])
def test_args_of_another_type_are_refused(tmp_path, args):
    path = saved(tmp_path / "a.pth", {"model": STATE, "epoch": 1, "args": args})
    with pytest.raises(CheckpointError, match=r"'args' of .*a\.pth' must be .*, got a \w+$"):
        load_checkpoint(path)


def test_every_flipped_bit_of_the_weights_is_detected(tmp_path):
    path = saved(tmp_path / "a.pth", {"model": {"weight": torch.rand(64, 64)}})
    data = path.read_bytes()
    start = data.index(load_checkpoint(path)["model"]["weight"].numpy().tobytes())
    for seed in range(30):
        damaged = bytearray(data)
        damaged[start + random.Random(seed).randrange(64 * 64 * 4)] ^= 1 << seed % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.pth' is damaged: a checksum in it is wrong"):
            load_checkpoint(path)


def test_a_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        path = saved(tmp_path / "a.pth", STATE)
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(load_checkpoint(path)["model"]["weight"], STATE["weight"])


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_unread(tmp_path):
    path = saved(tmp_path / "a.pth", {"model": {"weight": torch.zeros(10**7)}})
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert packed.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"claims a content of 40,\d+,\d+ bytes"):
        load_checkpoint(packed)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "claims a content of 4,000,000,000,"),
        (torch.zeros(2, 3).to_sparse(), "optimizer.state of .* must be a plain dense tensor"),
        (torch.zeros(2, 3, device="meta"), "optimizer.state of .* must be a plain dense tensor"),
    ],
    ids=["expanded", "sparse", "meta"],
)
def test_tensors_without_their_own_memory_are_refused(tmp_path, tensor, message, zipped):
    content = {"model": STATE, "optimizer": {"state": tensor}}
    path = saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"task": 3}, "a string"),
        ({"classes": ["a", "a"]}, "a list of different strings"),
        ({"classes": [["a"]]}, "a list of different strings"),
        ({"classes": "abc"}, "a list of different strings"),
        ({"label_to_category": [1, 2]}, "a dict of labels below"),
        ({"label_to_category": {"0": 1}}, "a dict of labels below"),
        ({"label_to_category": {0.5: 1}}, "a dict of labels below"),
        ({"label_to_category": {-1: 1}}, "a dict of labels below"),
        ({"label_to_category": {10**9: 1}}, "a dict of labels below"),
        ({"label_to_category": {0: 2**70}}, "a dict of labels below"),
        ({"image_size": [224, "224"]}, "one or two numbers of pixels"),
        ({"image_size": []}, "one or two numbers of pixels"),
        ({"attention_choices": ["triton"]}, "a dict of dicts"),
        ({"attention_choices": {"cpu": "triton"}}, "a dict of dicts"),
    ],
    ids=str,
)
def test_entries_of_another_kind_are_named(tmp_path, entry, wanted):
    path = saved(tmp_path / "a.pth", {"model": STATE} | entry)
    with pytest.raises(CheckpointError, match=f"'{next(iter(entry))}' of .* must be {wanted}"):
        load_checkpoint(path)


def test_categories_of_a_detector_may_have_the_same_name(tmp_path):
    content = {"model": STATE, "classes": ["a", "a"], "label_to_category": {0: 1, 1: 2}}
    assert load_checkpoint(saved(tmp_path / "a.pth", content))["classes"] == ["a", "a"]


def test_a_name_that_the_system_does_not_allow_is_an_error_in_one_sentence(tmp_path):
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match=r"cannot be read|does not exist"):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.full((2, 3), torch.nan), "weight has 6 values that are not finite"),
        (torch.zeros(2, 3).index_fill(1, torch.tensor(1), torch.inf), "weight has 2 values that"),
        (torch.zeros(2, 3, dtype=torch.int64), "weight has the dtype torch.int64, the model's is"),
        (torch.zeros(2, 3, dtype=torch.complex64), "weight has the dtype torch.complex64"),
    ],
    ids=["nan", "inf", "int", "complex"],
)
def test_weights_that_are_no_finite_numbers_are_refused(weights, message):
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, STATE | {"weight": weights})
    assert torch.equal(model.weight, before)
    # Finite weights whose sum is not.
    load_weights(model, STATE | {"weight": torch.full((2, 3), 3e38)})


def test_weights_of_eight_bits_are_accepted():
    model = nn.Linear(3, 2)
    load_weights(model, STATE | {"weight": STATE["weight"].to(torch.float8_e4m3fn)})
    assert torch.equal(model.weight, STATE["weight"])
    weight = torch.full((2, 3), torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="weight has 6 values that are not finite"):
        load_weights(model, STATE | {"weight": weight})
