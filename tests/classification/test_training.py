"""The whole trainer on the built-in digits: resuming, evaluation, several processes."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from classification import training
from classification.main import main
from irpe_core import autotune, functional
from tests.classification.conftest import weights
from tests.engine.launch import start, start_pair


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def metrics(record: dict) -> dict:
    return {name: value for name, value in record.items() if name.startswith("test_")}


def assert_same_weights(one: Path, other: Path) -> None:
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    different = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not different


def wait_for_step(folder: Path, process, seconds: float = 120) -> None:
    """Wait until there is a checkpoint from the middle of an epoch."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        if (folder / "checkpoint.pth").exists():
            content = torch.load(folder / "checkpoint.pth", weights_only=True)
            if content["epoch"] == 0 and content["step"] > 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint after {seconds} s")


def test_run_killed_in_mid_epoch_and_resumed_ends_with_the_same_weights(flags, trained, tmp_path):
    run = [*flags, "--epochs", "2", "--output_dir", str(tmp_path), "--checkpoint_steps", "3"]
    process = start("classification.main", *run)
    wait_for_step(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert 0 < killed["step"] < 20
    main([*run, "--auto_resume"])
    assert_same_weights(trained, tmp_path)
    assert metrics(lines(tmp_path)[-1]) == metrics(lines(trained)[-1])
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1]


def test_a_run_that_augments_on_the_device_resumes_to_the_same_weights(flags, tmp_path):
    run = [*flags, "--epochs", "1", "--augment_on", "device", "--output_dir"]
    main([*run, str(tmp_path / "whole")])
    main([*run, str(tmp_path / "parts"), "--max_steps", "7"])
    main([*run, str(tmp_path / "parts"), "--auto_resume"])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_computes_attention_as_before(flags, tmp_path, monkeypatch):
    resolve = functional.fused_implementation
    monkeypatch.setenv("IRPE_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "CANDIDATES", ("reference", "composed"))
    monkeypatch.setattr(
        functional,
        "fused_implementation",
        lambda choice, device: "triton" if choice == "auto" else resolve(choice, device),
    )

    def run(fastest: str, *options: str) -> dict:
        tuner = autotune.Autotuner(lambda *_: {fastest: 1e-3}, tmp_path / f"{fastest}.json")
        for module in (functional, training):
            monkeypatch.setattr(module, "AUTOTUNER", tuner)
        main([*flags, "--epochs", "2", "--keep_checkpoints", "2", *options])
        return tuner.state_dict()

    before, after = tmp_path / "before", tmp_path / "after"
    choices = run("reference", "--output_dir", str(before))
    (table,) = choices.values()
    assert set(table.values()) == {"reference"}
    first = before / "checkpoint_0000.pth"
    assert torch.load(first, weights_only=True)["attention_choices"] == choices
    assert run("composed", "--output_dir", str(after), "--resume", str(first)) == choices
    assert_same_weights(before, after)


def test_sigterm_writes_a_checkpoint_that_resumes_to_the_same_weights(flags, trained, tmp_path):
    run = [*flags, "--epochs", "2", "--output_dir", str(tmp_path), "--checkpoint_steps", "3"]
    process = start("classification.main", *run)
    wait_for_step(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    main([*run, "--resume", str(tmp_path / "checkpoint.pth")])
    assert_same_weights(trained, tmp_path)


def test_evaluation_of_a_checkpoint_gives_the_metrics_of_training(flags, trained, tmp_path):
    checkpoint = str(trained / "checkpoint.pth")
    main([*flags, "--eval", "--resume", checkpoint, "--output_dir", str(tmp_path)])
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    assert metrics(evaluated) == metrics(lines(trained)[-1])
    assert evaluated["images"] == 359
    assert evaluated["images_per_s"] > 0


def test_ema_is_evaluated_and_differs_from_the_weights(trained):
    line = lines(trained)[-1]
    assert {"test_ema_acc1", "test_ema_acc5", "test_ema_loss"} <= line.keys()
    assert line["test_ema_loss"] != line["test_loss"]
    content = weights(trained)
    assert not torch.equal(content["head.weight"], content["ema.head.weight"])


def test_two_processes_have_the_metrics_of_one_bit_for_bit(flags, trained, tmp_path):
    # 359 images in batches of 64 or of 50: the processes have different numbers of images.
    for batch_size in ("64", "50"):
        run = [*flags, "--batch_size", batch_size, "--eval"]
        run += ["--resume", str(trained / "checkpoint.pth"), "--log_images", "2", "--output_dir"]
        one, two = tmp_path / f"one{batch_size}", tmp_path / f"two{batch_size}"
        main([*run, str(one)])
        for process in start_pair("classification.main", *run, str(two)):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        evaluated = [json.loads((folder / "eval.json").read_text()) for folder in (one, two)]
        assert metrics(evaluated[0]) == metrics(evaluated[1])
        assert evaluated[1]["images"] == 359
        for name in ("metrics_per_class.json", "images/mistakes_0.png", "images/mistakes_1.png"):
            assert (one / name).read_bytes() == (two / name).read_bytes()


def test_one_process_resumes_a_training_of_two(flags, tmp_path):
    run = [*flags, "--batch_size", "32", "--epochs", "1", "--output_dir", str(tmp_path)]
    for process in start_pair("classification.main", *run):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(lines(tmp_path)) == 1
    main([*run, "--epochs", "2", "--auto_resume"])
    assert [line["epoch"] for line in lines(tmp_path)] == [0, 1]


def test_log_has_a_json_line_for_every_epoch(trained):
    record = lines(trained)
    assert [line["epoch"] for line in record] == [0, 1]
    expected = {"train_loss", "train_lr", "train_images_per_s", "test_acc1", "test_acc5"}
    assert expected | {"test_loss", "epoch", "n_parameters"} <= record[0].keys()
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    size = sum(v.numel() for v in content["model"].values())
    assert record[0]["n_parameters"] == size


def test_checkpoint_has_the_documented_entries(trained):
    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    names = {"model", "optimizer", "lr_scheduler", "epoch", "args", "model_ema", "scaler"}
    assert names <= content.keys()
    assert content["epoch"] == 1
    assert content["args"]["rpe"] == "rpe-1.9-product-ctx-1-qkv"
    # The implementation that ran, because the option is "auto".
    assert content["provenance"]["rpe_ops"].startswith(("fused attention by", "gather by"))


def test_repeated_augmentation_uses_other_images_in_every_epoch_of_one_process(flags):
    """The original does not shuffle again without torchrun, so that it uses a third of the data."""
    from classification.config import parse_args
    from classification.data import build_split, train_loader

    config = parse_args(flags)
    data = build_split(config, "train")
    sampler = train_loader(data, config, torch.device("cpu")).sampler
    seen: set[int] = set()
    for epoch in range(8):
        sampler.set_epoch(epoch)
        seen |= {index for index, _ in sampler}
        if epoch == 0:
            assert len(seen) < 0.4 * len(data)
    assert len(seen) > 0.9 * len(data)


def test_last_epoch_is_evaluated_with_any_eval_interval(flags, tmp_path):
    run = [*flags, "--epochs", "3", "--eval_interval", "2", "--output_dir", str(tmp_path)]
    main(run)
    assert ["test_acc1" in line for line in lines(tmp_path)] == [False, True, True]


def test_folder_and_tar_train_to_the_same_weights(flags, tmp_path):
    for name, extra in (("folder", []), ("tar", ["--load-tar"])):
        main([*flags, *extra, "--epochs", "1", "--output_dir", str(tmp_path / name)])
    assert_same_weights(tmp_path / "folder", tmp_path / "tar")


def test_accumulated_batches_make_one_optimizer_step(flags, tmp_path):
    run = [*flags, "--epochs", "1", "--output_dir", str(tmp_path)]
    main([*run, "--batch_size", "32", "--accumulate_steps", "2"])
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    steps = {int(state["step"]) for state in content["optimizer"]["state"].values()}
    assert steps == {1280 // 64}


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_student_learns_from_a_teacher(kind, flags, tmp_path):
    import timm

    teacher = timm.create_model("resnet10t", num_classes=10)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    run = [*flags, "--epochs", "1", "--output_dir", str(tmp_path), "--distillation_token"]
    run += ["--distillation-type", kind, "--teacher-model", "resnet10t"]
    main([*run, "--teacher-path", str(tmp_path / "teacher.pth"), "--input_size", "32"])
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert "head_dist.weight" in content["model"]
    assert not any("conv1" in key for key in content["model"])
    assert content["model"]["blocks.0.attn.rpe_k.lookup_table_weight"].shape[-1] == 50


def test_fine_tuning_accepts_another_image_size(flags, trained, tmp_path):
    run = [*flags, "--finetune", str(trained / "checkpoint.pth"), "--eval"]
    main([*run, "--input_size", "24", "32", "--output_dir", str(tmp_path)])
    assert (tmp_path / "eval.json").exists()


def test_training_on_rectangles(flags, tmp_path):
    main([*flags, "--input_size", "16", "24", "--epochs", "1", "--output_dir", str(tmp_path)])
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert content["model"]["pos_embed"].shape[1] == 4 * 6 + 1


def test_position_embedding_can_be_left_out(flags, tmp_path):
    main([*flags, "--no-abs_pos_embed", "--epochs", "1", "--output_dir", str(tmp_path)])
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert "pos_embed" not in content["model"]


def test_training_with_bfloat16_and_gradient_clipping(flags, tmp_path):
    run = [*flags, "--dtype", "bfloat16", "--clip_grad", "1.0", "--epochs", "1"]
    main([*run, "--output_dir", str(tmp_path)])
    assert "train_grad_norm" in lines(tmp_path)[0]


@pytest.mark.slow
def test_compiled_model_trains_to_nearly_the_same_loss(flags, trained, tmp_path):
    main([*flags, "--compile", "--epochs", "1", "--output_dir", str(tmp_path)])
    assert lines(tmp_path)[0]["train_loss"] == pytest.approx(
        lines(trained)[0]["train_loss"], rel=1e-3
    )


def test_corrupt_image_is_replaced_and_training_continues(flags, digits, tmp_path, caplog):
    data = tmp_path / "digits"
    shutil.copytree(digits, data)
    image = next((data / "train" / "3").glob("*.png"))
    image.write_bytes(image.read_bytes()[:20])
    main(
        [
            *flags,
            "--data_set",
            "IMNET",
            "--data_path",
            str(data),
            "--no-repeated_aug",
            "--epochs",
            "1",
            "--output_dir",
            str(tmp_path / "out"),
        ]
    )
    assert len(lines(tmp_path / "out")) == 1
    assert any(image.name in record.getMessage() for record in caplog.records)
