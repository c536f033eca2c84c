"""Checkpoints of every origin, given to every option that accepts one, and error messages."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from detection.main import main
from irpe_core import CheckpointError, load_weights
from tests.detection.models import network
from tests.origins import evaluation, write_origins
from tests.web_server import serve

NO_IRPE = "the checkpoint has no iRPE: the 3 tables keep their initial values"


@pytest.fixture(scope="session")
def files(trained, tmp_path_factory) -> dict[str, Path]:
    """Return the trained weights in the file format of each origin."""
    args = argparse.Namespace(enc_rpe2d="rpe-2.0-product-ctx-1-qkv", masks=False, lr=1e-3)
    folder = tmp_path_factory.mktemp("origins")
    return write_origins(trained / "checkpoint.pth", folder, args)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


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
    for name in ("ours", "original-training", "original-release", "wrapped", "safetensors"):
        metrics = evaluation(main, tmp_path / name, *flags, option, str(files[name]))
        assert metrics == {key: expected[key] for key in metrics}, name
        assert "test_AP" in metrics


def test_plain_detr_is_accepted_and_the_tables_are_random(flags, files, tmp_path, caplog):
    plain = str(files["plain-release"])
    for option in ("--resume", "--finetune"):
        caplog.clear()
        evaluation(main, tmp_path / option, *flags, option, plain)
        assert NO_IRPE in caplog.messages
    caplog.clear()
    evaluation(main, tmp_path / "plain", *flags, "--enc_rpe2d", "", "--resume", plain)
    assert NO_IRPE not in caplog.messages
    main([*flags, "--finetune", plain, "--epochs", "1", "--output_dir", str(tmp_path / "tuned")])
    assert any("rpe_v.lookup_table_weight" in key for key in weights(tmp_path / "tuned"))


def test_training_does_not_resume_from_weights_that_do_not_fit(flags, files, failure):
    code, line = failure(*flags, "--resume", str(files["plain-training"]))
    assert code == 1
    assert "3 missing: transformer.encoder.layers.0.self_attn.rpe_q.lookup_table_weight" in line
    assert line.endswith("the checkpoint has no iRPE, the model has it on q, k, v")
    code, line = failure(*flags, "--resume", str(files["plain-release"]))
    assert code == 1
    assert "no optimizer, lr_scheduler, epoch to resume training with: use --finetune" in line


@pytest.mark.parametrize("option", ["--resume", "--finetune", "--backbone_weights"])
def test_code_in_a_checkpoint_is_not_run(option, flags, trained, tmp_path, failure):
    witness = tmp_path / "was-run"

    class Payload:
        def __reduce__(self):
            return open, (str(witness), "w")

    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    torch.save(content | {"args": argparse.Namespace(device=Payload())}, tmp_path / "evil.pth")
    code, line = failure(*flags, option, str(tmp_path / "evil.pth"))
    assert code == 1
    assert "evil.pth' holds objects other than tensors and plain values" in line
    assert not witness.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)["args"].device.close()
    assert witness.exists(), "the payload does nothing"


def test_a_checkpoint_is_downloaded_from_a_url(flags, files, tmp_path, failure, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with serve(detector=files["original-release"].read_bytes()) as site:
        run = [*flags, "--eval", "--resume", site.url("detector.pth")]
        site.break_after = [20_000]
        code, line = failure(*run)
        assert (code, "broke off at 20000 of " in line) == (1, True)
        evaluation(main, tmp_path / "out", *run)
        assert site.requests[-1]["Range"] == "bytes=20000-"
        url = site.url("none.pth")
        code, line = failure(*flags, "--finetune", url)
        assert (code, f"cannot download {url}: the server answered 404" in line) == (1, True)


SMALL = (
    "--backbone small --backbone_norm batch --hidden_dim 32 --nheads 4 --dim_feedforward 48 "
    "--enc_layers 2 --dec_layers 3 --num_queries 7 --num_classes 5 --enc_rpe2d "
)
SPEC = "rpe-2.0-product-ctx-1-k"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("rpe-1.9-product-ctx-1-k", "has 7×7 product tables (49 buckets), the model's spec asks"),
        ("rpe-2.0-product-ctx-0-k", "has a table for each of 4 heads, the model tables that the"),
        (f"{SPEC} --num_queries 9", "has 9 object queries, the model 7"),
        (f"{SPEC} --num_classes 9", "has 10 class outputs, the model 6"),
        (f"{SPEC} --hidden_dim 64", "is 64 channels wide, the model 32"),
        (f"{SPEC} --enc_layers 1", "has 1 transformer.encoder.layers, the model 2, and has iRPE"),
        (f"{SPEC} --backbone resnet18", "has another backbone than the model"),
        (f"{SPEC} --backbone_norm frozen", "has frozen batch norms, the model ordinary ones"),
        (f"{SPEC} --masks", "has 'detr.' before its names, which the model does not"),
    ],
)
def test_another_detector_is_recognized(found, expected):
    weights = network(SMALL + found).state_dict()
    with pytest.raises(CheckpointError) as caught:
        load_weights(network(SMALL + SPEC), weights)
    assert expected in str(caught.value).partition("likely cause: the checkpoint ")[2]
    assert len(str(caught.value)) < 900
