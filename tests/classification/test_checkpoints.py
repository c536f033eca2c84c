"""Checkpoints of every origin, given to every option that accepts one, and error messages."""

import argparse
import json
import logging
import os
import resource
import socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from classification.main import main
from classification.models import build_model
from irpe_core import CheckpointError, load_weights
from tests.classification.conftest import weights
from tests.origins import evaluation, write_origins
from tests.recipes import fill
from tests.web_server import serve

PUBLISHED = "deit_tiny_patch16_224_ctx_product_50_shared_k"
NO_IRPE = "the checkpoint has no iRPE: the 6 tables keep their initial values"


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.fixture(scope="session")
def files(trained, tmp_path_factory) -> dict[str, Path]:
    """Return the trained weights in the file format of each origin."""
    args = argparse.Namespace(model="deit_tiny", input_size=16, lr=2e-3, opt_betas=None)
    folder = tmp_path_factory.mktemp("origins")
    return write_origins(trained / "checkpoint.pth", folder, args)


def test_training_continues_from_a_checkpoint_of_the_original_as_from_ours(flags, files, tmp_path):
    for name in ("ours", "original-training"):
        run = [*flags, "--resume", str(files[name]), "--epochs", "3"]
        main([*run, "--output_dir", str(tmp_path / name)])
    expected, got = weights(tmp_path / "ours"), weights(tmp_path / "original-training")
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[key]) for key, value in expected.items())


@pytest.mark.parametrize("option", ["--resume", "--finetune"])
def test_checkpoints_of_all_origins_have_the_same_metrics(option, flags, files, trained, tmp_path):
    expected = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    for name in ("ours", "original-training", "original-release", "bare", "wrapped", "safetensors"):
        metrics = evaluation(main, tmp_path / name, *flags, option, str(files[name]))
        assert metrics == {key: expected[key] for key in metrics}, name
        assert "test_acc1" in metrics


def test_plain_weights_evaluate_and_fine_tune_with_tables_at_zero(flags, files, tmp_path, caplog):
    plain = str(files["plain-release"])
    expected = evaluation(main, tmp_path / "plain", *flags, "--rpe", "", "--resume", plain)
    assert NO_IRPE not in caplog.messages
    for option in ("--resume", "--finetune"):
        caplog.clear()
        metrics = evaluation(main, tmp_path / option, *flags, option, plain)
        assert metrics == pytest.approx(expected, rel=1e-5)
        assert NO_IRPE in caplog.messages
    with_ema = str(files["plain-training"])
    assert "test_ema_acc1" in evaluation(main, tmp_path / "ema", *flags, "--resume", with_ema)
    main([*flags, "--finetune", plain, "--epochs", "1", "--output_dir", str(tmp_path / "tuned")])
    assert weights(tmp_path / "tuned")["blocks.0.attn.rpe_v.lookup_table_weight"].any()


def test_training_does_not_resume_from_weights_that_do_not_fit(flags, files, failure):
    code, line = failure(*flags, "--resume", str(files["plain-training"]))
    assert code == 1
    assert "6 missing: blocks.*.attn.rpe_q.lookup_table_weight" in line
    assert line.endswith("the checkpoint has no iRPE, the model has it on q, k, v")
    code, line = failure(*flags, "--resume", str(files["plain-release"]))
    assert code == 1
    assert "no optimizer, lr_scheduler, epoch to resume training with: use --finetune" in line


@pytest.mark.parametrize("option", ["--resume", "--finetune"])
def test_code_in_a_checkpoint_is_not_run(option, flags, trained, tmp_path, failure):
    witness = tmp_path / "was-run"
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    args = argparse.Namespace(model="deit", device=Payload(witness))
    torch.save(content | {"args": args}, tmp_path / "evil.pth")
    code, line = failure(*flags, "--eval", option, str(tmp_path / "evil.pth"))
    assert code == 1
    assert "objects other than tensors and plain values" in line
    assert "evil.pth" in line
    assert not witness.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert witness.exists(), "the payload does nothing"


@pytest.mark.parametrize("option", ["--resume", "--finetune"])
def test_a_checkpoint_is_downloaded_from_a_url(
    option, flags, files, tmp_path, failure, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    with serve(tiny=files["bare"].read_bytes()) as site:
        size = len(site.files["/tiny.pth"])
        run = [*flags, "--eval", option, site.url("tiny.pth")]
        site.break_after = [20_000]
        code, line = failure(*run)
        assert (code, f"broke off at 20000 of {size} bytes" in line) == (1, True)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        try:
            code, line = failure(*run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (code, "tiny.pth.part: File too large" in line) == (1, True)
        assert not (cache / "tiny.pth").exists()
        metrics = evaluation(main, tmp_path / "out", *run)
        assert [r.get("Range") for r in site.requests] == [None, "bytes=20000-", "bytes=40000-"]
        assert metrics == evaluation(
            main, tmp_path / "file", *flags, "--resume", str(files["bare"])
        )
        assert sorted(path.name for path in cache.iterdir()) == ["tiny.pth", "tiny.pth.json"]
        url = site.url("none.pth")
        code, line = failure(*flags, "--eval", option, url)
        assert (code, f"cannot download {url}: the server answered 404" in line) == (1, True)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/gone.pth"
        code, line = failure(*flags, "--eval", option, url)
        assert (code, f"cannot download {url}: Connection refused" in line) == (1, True)


def test_pretrained_downloads_the_release_and_reports_what_does_not_fit(
    flags, tmp_path, failure, monkeypatch, caplog
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    released = fill(build_model(PUBLISHED, num_classes=1000, input_size=(224, 224)))
    torch.save({"model": released.state_dict()}, tmp_path / "zoo.pth")
    data = [*flags[flags.index("--data_set") :], "--model", PUBLISHED, "--eval", "--pretrained"]
    registered = timm.models._registry._model_pretrained_cfgs[PUBLISHED]
    with serve(zoo=(tmp_path / "zoo.pth").read_bytes()) as site:
        monkeypatch.setattr(registered, "url", site.url("zoo.pth"))
        metrics = evaluation(main, tmp_path / "out", *data, "--input_size", "32")
        assert metrics["test_loss"] > 0
        assert "head.weight has new random weights for 10 classes" in caplog.messages
        assert "position embedding resampled to a grid of 2 x 2" in caplog.messages
        code, line = failure(*data, "--input_size", "32", "--embed_dim", "96")
        assert code == 1
        assert "the checkpoint is 192 channels wide, the model 96" in line
        monkeypatch.setattr(registered, "url", site.url("none.pth"))
        code, line = failure(*data)
        assert (code, "none.pth: the server answered 404 Not Found" in line) == (1, True)


def test_pretrained_weights_of_timm_get_tables_at_zero(
    flags, tmp_path, failure, monkeypatch, caplog
):
    """The cache of the Hugging Face hub is replaced by a folder; nothing is downloaded."""
    name = "deit_tiny_patch16_224"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    data = [*flags[flags.index("--data_set") :], "--model", name, "--eval", "--pretrained"]
    data += ["--input_size", "32", "--rpe", "rpe-1.9-product-ctx-1-k"]
    code, line = failure(*data)
    assert (code, f"timm cannot load the weights of '{name}': " in line) == (1, True)
    cached = tmp_path / f"models--timm--{name}.fb_in1k"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    released = fill(build_model(name, num_classes=1000, input_size=(224, 224))).state_dict()
    save_file(released, cached / "snapshots" / "1" / "model.safetensors")
    evaluation(main, tmp_path / "out", *data)
    assert f"the weights of {name} have no iRPE: its tables start at zero" in caplog.messages
    code, line = failure(*data, "--embed_dim", "96")
    assert (code, f"timm cannot load the weights of '{name}': " in line) == (1, True)


def test_an_unreachable_hub_is_reported_in_one_sentence(
    flags, tmp_path, failure, monkeypatch, caplog
):
    """The hub library itself warns in two lines for each of its ten retries."""
    sleeps = []
    monkeypatch.setattr("time.sleep", sleeps.append)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    data = [*flags[flags.index("--data_set") :], "--eval", "--pretrained"]
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        code, line = failure(*data, "--model", "deit_tiny_patch16_224", "--input_size", "32")
    assert (code, "timm cannot load the weights of 'deit_tiny_patch16_224': " in line) == (1, True)
    assert any("timm loads the weights" in message for message in caplog.messages)
    assert sleeps, "the hub was not requested"
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]
    assert hub.level == level


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "num_classes": 10}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"embed_dim": 64}, "is 64 channels wide, the model 32, and has heads of 32 channels, the"),
        ({"depth": 3}, "has 3 blocks, the model 2, and has iRPE in 3 attentions, the model in 2"),
        ({"num_classes": 7}, "has 7 class outputs, the model 10"),
        ({"input_size": (24, 24)}, "has 37 position embeddings, the model 17 (another image size)"),
        ({"patch_size": 8, "input_size": (32, 32)}, "has patches of 8 pixels, the model of 4"),
        ({"distillation_token": True}, "and has a distillation token, the model none"),
        ({"abs_pos_embed": False}, "has no position embedding, the model has one"),
        (
            {"rpe": "rpe-2.0-product-ctx-1-k"},
            "has 9×9 product tables (82 buckets), the model's spec",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_model_is_recognized(found, expected):
    common = SMALL | {"input_size": (16, 16), "rpe": "rpe-1.9-product-ctx-1-k"}
    other = build_model("deit_tiny_patch16_224", **common | found)
    with pytest.raises(CheckpointError) as caught:
        load_weights(build_model("deit_tiny_patch16_224", **common), other.state_dict())
    assert expected in str(caught.value).partition("likely cause: the checkpoint ")[2]
    assert len(str(caught.value)) < 900
