"""Ablations: mistakes before anything runs, cells, failures, resumption and the report."""

import contextlib
import csv
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from engine import UserError
from engine.folder_lock import lock_folder
from scripts.ablate.__main__ import main
from scripts.ablate.cells import load_ablation
from scripts.ablate.collected import collect
from scripts.ablate.processes import Launcher
from tests.commands import failure_of

ROOT = Path(__file__).parents[2]
# The stub has the interface of a trainer and starts without torch.
STUB = shlex.join([sys.executable, str(Path(__file__).with_name("ablate_trainer.py"))])

TINY = """
trainer: classification
metric: test_acc1
seeds: [0, 1, 2]
options: {model: deit_tiny_patch16_224, input_size: 24, patch_size: 4, embed_dim: 32, depth: 1,
          num_heads: 2, epochs: 3, data_set: DIGITS, data_path: nowhere}
variants:
  none: {abs_pos_embed: false}
  iRPE k: {rpe: rpe-1.9-product-ctx-1-k, abs_pos_embed: false}
  iRPE q: {rpe: rpe-1.9-product-ctx-1-q, abs_pos_embed: false}
"""
EVALUATED = TINY + "evaluate_at: {label: size, points: {24: {}, 32: {input_size: 32}}}\n"
TRAINED = TINY + "train_at: {label: epochs, points: {1: {lr: 1e-3}, 2: {lr: 2e-3}}}\n"


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a file and returns the flags of a run with the stub."""

    def write(text: str = TINY, name: str = "tiny.yaml") -> list[str]:
        (tmp_path / name).write_text(text)
        return [
            *(str(tmp_path / name), "--output_dir", str(tmp_path / "out")),
            *("--launcher", STUB, "--device", "cpu"),
        ]

    return write


@pytest.fixture
def out(tmp_path):
    """Return the output folder."""
    return tmp_path / "out"


def starts(out: Path) -> dict[str, list[str]]:
    """Return the epochs at which each training was started, by the folder of its cell."""
    return {
        path.parent.relative_to(out).as_posix(): path.read_text().split()
        for path in sorted(out.rglob("starts.txt"))
    }


def numbers(out: Path) -> dict:
    """Return the metrics and statistics of a report, without times."""
    content = json.loads((out / "results.json").read_text())
    return {name: variant["points"] for name, variant in content["variants"].items()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("metric:", "metrics:"), "tiny.yaml, line 3: metrics is not an option: did you mean met"),
        (("seeds: [0, 1, 2]", "seeds: [0, 1, 1]"), "line 4: seeds must be different seeds, got"),
        (("seeds: [0, 1, 2]", "seeds: 3"), "seeds must be a list of integers from 0 on"),
        (("iRPE q:", "iRPE k:"), "line 10: not valid YAML: iRPE k is given twice"),
        (("iRPE q:", "iRPE_k:"), "letters and digits, got 'iRPE k' and 'iRPE_k'"),
        (("iRPE q:", "off:"), "variants must have labels of text (put False in quotes)"),
        (("-ctx-1-q,", "-ctx-1-k,"), "'iRPE k' and 'iRPE q' must differ: they give the same"),
        (("-ctx-1-q,", "-ctx-1-z,"), "tiny.yaml: variant 'iRPE q': rpe 'rpe-1.9-product-ctx-1-z'"),
        (("epochs: 3", "epoch: 3"), "tiny.yaml: options: epoch is not an option of the trainer: "
         "did you mean epochs?"),
        (("epochs: 3", "epochs: x"), "variant 'none': epochs must be an integer, got 'x'"),
        (("none: {", "none: {seed: 3, "), "variant 'none': seed must not be set: the ablation"),
        (("none: {", "none: {num_heads: 3, "), "variant 'none': model 'deit_tiny_patch16_224' "
         "cannot be built with these options"),
        (("test_acc1", "test_ac1"), "variant 'none': metric must be one of test_acc1, test_acc5, "
         "test_loss, test_ema_acc1, test_ema_acc5, test_ema_loss, train_loss, got 'test_ac1'"),
        (("trainer: classification", "trainer: segmentation"), "line 2: trainer must be"),
        (("trainer: classification", "config: no.yaml\ntrainer: classification"), "no.yaml: No su"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_mistakes_are_one_sentence_before_anything_runs(change, expected, file, out, capsys):
    assert change[0] in TINY
    code, line = failure_of(main, file(TINY.replace(*change)), capsys)
    assert code == 2
    assert expected in line
    assert not out.exists()


def test_labels_may_differ_in_punctuation_alone(file, capsys):
    main([*file(TINY.replace("iRPE q:", "iRPE-k:")), "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["iRPE k, seed 0", "iRPE-k, seed 0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TINY + "train_at: {points: {1: {}}}\n", "train_at must have two keys, label (text) and"),
        (TINY + "train_at: {label: x, points: {}}\n", "train_at must have at least one point"),
        (TRAINED + "evaluate_at: {label: x, points: {1: {}}}\n", "train_at and evaluate_at excl"),
        (TRAINED.replace("{lr: 2e-3}", "{rpe: ''}"), "variant 'iRPE k', point '2': rpe must be set "
         "by the variant or by the point, not both"),
        (TRAINED.replace("2e-3", "0.001"), "'none, 1' and 'none, 2' must differ"),
        (EVALUATED.replace("32}", "24}"), "points '24' and '32' must differ"),
        (EVALUATED.replace("32}", "3}"), "variant 'none', point '32': --patch-size must be"),
        (EVALUATED.replace("test_acc1", "train_loss"), "got 'train_loss'"),
        ("- 1\n", "must contain `option: value` lines"),
        ("", "--trainer is required"),
    ],
)  # fmt: skip
def test_mistakes_in_points_are_one_sentence(text, expected, file, capsys):
    code, line = failure_of(main, file(text), capsys)
    assert code == 2
    assert expected in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--jobs", "0"], "--jobs must be greater than or equal to 1, got '0'"),
        (["--launcher", "no-such-command -x"], "--launcher must be a command, got 'no-such"),
        (["--report", "--dry_run"], "--dry_run and --report exclude each other"),
        (["--cell", "none/seed_7"], "--cell must be a folder such as none/seed_0, got 'none/s"),
        (["--job", "2"], "unknown flag --job: did you mean --jobs?"),
        (["--reference", "q"], "--reference must be one of none, iRPE k, iRPE q, got 'q'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_in_flags_are_one_sentence(flags, expected, file, capsys):
    code, line = failure_of(main, [*file(), *flags], capsys)
    assert code == 2
    assert expected in line


def test_a_dry_run_prints_cells_and_commands(file, out, capsys):
    main([*file(EVALUATED), "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["none, seed 0", "iRPE k, seed 0", "iRPE q, seed 0", "none, seed 1"]
    assert lines[9] == "9 cells, each evaluated at 2; the first runs"
    assert f"--config {out}/none/seed_0/options.yaml --output_dir {out}/none/seed_0" in lines[10]
    assert lines[11].endswith(f"classification {out}/none/seed_0/evaluate/32/options.yaml "
                              "--device cpu")  # fmt: skip
    assert not out.exists()


def test_the_report_has_the_metrics_of_all_cells(file, out, capsys):
    main([*file(), "--jobs", "2"])
    printed = capsys.readouterr().out
    assert "[9/9]" in printed
    table = (out / "table.md").read_text()
    assert table in printed
    content = json.loads((out / "results.json").read_text())
    gain = content["variants"]["iRPE k"]["points"][""]
    logs = {
        name: [
            json.loads((out / name / f"seed_{seed}" / "log.txt").read_text().splitlines()[-1])
            for seed in range(3)
        ]
        for name in ("none", "iRPE_k")
    }
    expected = [log["test_acc1"] for log in logs["iRPE_k"]]
    assert list(gain["seeds"].values()) == expected
    assert gain["difference"]["verdict"] == "better"
    assert f"| {sum(expected) / 3:.2f} ± " in table
    assert "Intervals are per comparison, not\ncorrected" in table
    assert "2 cells ran at once" in table
    assert content["variants"]["none"]["points"][""]["difference"] is None
    macs = [content["variants"][name]["macs"] for name in ("none", "iRPE k")]
    assert 0 < macs[0] < macs[1]
    assert len(content["cells"]) == 9
    assert content["cells"][0]["machine"]["torch"]
    assert content["missing"] == []
    with (out / "cells.csv").open() as rows:
        rows = list(csv.DictReader(rows))
    assert [row["seed"] for row in rows] == [str(seed) for seed in range(3) for _ in range(3)]
    assert float(rows[1]["test_acc1"]) == expected[0]
    with Image.open(out / "plot.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_a_loss_is_better_if_it_is_lower(file, out):
    main(file(TINY.replace("test_acc1", "test_loss")))
    found = json.loads((out / "results.json").read_text())["variants"]["iRPE k"]["points"][""]
    assert found["difference"]["mean"] < 0
    assert found["difference"]["verdict"] == "better"
    assert "Lower is better." in (out / "table.md").read_text()


def test_a_report_compares_with_any_variant(file, out, capsys):
    main(file(EVALUATED))
    first = numbers(out)
    main([*file(EVALUATED), "--report", "--reference", "iRPE k"])
    second = numbers(out)
    for point in ("24", "32"):
        gain = first["iRPE k"][point]["difference"]
        assert second["iRPE k"][point]["difference"] is None
        loss = second["none"][point]["difference"]
        assert loss["mean"] == pytest.approx(-gain["mean"])
        assert (gain["verdict"], loss["verdict"]) == ("better", "worse")
    table = (out / "table.md").read_text()
    assert "Difference to *iRPE k*" in table
    assert "--reference 'iRPE k'" in table
    rows = table.partition("Difference to *iRPE k*:\n\n")[2].partition("\n\n")[0].splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["none", "iRPE q"]


def test_trained_models_are_evaluated_at_points(file, out, capsys):
    main(file(EVALUATED))
    points = numbers(out)["none"]
    assert list(points) == ["24", "32"]
    for seed in "012":
        assert points["32"]["seeds"][seed] - points["24"]["seeds"][seed] == pytest.approx(0.8)
    # The point of the training is not evaluated again.
    assert not (out / "none/seed_0/evaluate/24").exists()
    options = yaml.safe_load((out / "none/seed_0/evaluate/32/options.yaml").read_text())
    assert (options["eval"], options["input_size"], options["seed"]) == (True, 32, 0)
    assert "Difference to *none*" in (out / "table.md").read_text()
    assert (out / "plot.png").stat().st_size > 5000


def test_variants_seeds_and_points_are_added_to_finished_cells(file, out, capsys):
    text = TINY.replace("seeds: [0, 1, 2]", "seeds: [0]")
    main(file(text.replace("  iRPE q", "#")))
    before = starts(out)
    assert len(before) == 2
    main(file(EVALUATED.replace("seeds: [0, 1, 2]", "seeds: [0, 1]")))
    after = starts(out)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before == {name: ["0"] for name in before}
    assert numbers(out)["iRPE k"]["32"]["summary"]["n"] == 2
    capsys.readouterr()
    main(file(EVALUATED.replace("seeds: [0, 1, 2]", "seeds: [0, 1]")))
    assert capsys.readouterr().out.startswith("6 of 6 cells are done\n## tiny")
    assert starts(out) == after


def test_other_options_of_a_trained_cell_are_an_error(file, out, capsys):
    text = TINY.replace("seeds: [0, 1, 2]", "seeds: [0]")
    main(file(text))
    code, line = failure_of(main, file(text.replace("epochs: 3", "epochs: 4")), capsys)
    assert code == 2
    assert f"cell 'none, seed 0' ran with epochs 3 in {out}/none/seed_0, but the file now" in line
    (out / "none/seed_0/options.yaml").unlink()
    code, line = failure_of(main, file(text), capsys)
    assert (code, "has a checkpoint but no valid options.yaml" in line) == (2, True)


def test_another_way_to_write_the_same_options_changes_nothing(file, out):
    text = TINY.replace("seeds: [0, 1, 2]", "seeds: [0]")
    main(file(text))
    main(file(text.replace("epochs: 3", "lr: 5.0e-4, batch-size: 64, epochs: 3.0")))
    assert set(map(tuple, starts(out).values())) == {("0",)}


def test_a_folder_of_another_ablation_or_with_other_files_is_refused(file, out, capsys):
    out.mkdir()
    (out / "precious.txt").write_text("x")
    code, line = failure_of(main, file(), capsys)
    assert (code, "must be new, empty or have this ablation, got other files" in line) == (2, True)
    (out / "precious.txt").unlink()
    main([*file(TINY), "--cell", "none/seed_0"])
    code, line = failure_of(main, file(name="other.yaml"), capsys)
    assert code == 2
    assert "(other of classification), got that of tiny of classification" in line


def test_two_ablations_in_one_folder_are_refused(file, out, capsys):
    out.mkdir()
    program = f"from pathlib import Path; from engine.folder_lock import lock_folder; import sys; \
lock = lock_folder(Path({str(out)!r})); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=-1, stdout=-1, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        code, line = failure_of(main, file(), capsys)
        other.stdin.close()
    assert code == 1
    assert f"{out} is in use by another run (process {other.pid} on" in line
    assert starts(out) == {}


def test_a_failed_cell_leaves_the_others_and_is_tried_again(file, out, capsys):
    text = TINY.replace("none: {", "none: {clip_grad: 13, ")
    with pytest.raises(UserError, match="3 of 9 cells failed: none, seed 0; none, seed 1; none"):
        main(file(text))
    captured = capsys.readouterr()
    log = out / "none/seed_1/console.log"
    assert f"none, seed 1 failed: the loss must be finite, got nan ({log})" in captured.out
    assert len(collect(load_ablation(file(text)[0]), out).missing) == 3
    assert "Missing: 3 of 9 metrics (none, seed 0; none, seed 1; none, seed 2)." in captured.out
    with pytest.raises(UserError, match="3 of 9 cells failed"):
        main(file(text))
    after = starts(out)
    # It resumes from its last checkpoint and fails again; the others are done.
    assert after["none/seed_0"] == ["0", "2"]
    assert after["iRPE_k/seed_0"] == ["0"]


def test_a_failed_evaluation_keeps_the_training(file, out, capsys):
    text = TINY.replace("seeds: [0, 1, 2]", "seeds: [0]")
    points = "evaluate_at: {label: size, points: {%s: {input_size: %s}}}\n"
    with pytest.raises(UserError, match="3 of 3 cells failed"):
        main(file(text + points % (40, 40)))
    assert "the evaluation failed" in capsys.readouterr().out
    assert "Missing: 3 of 3 metrics (none, seed 0 at 40;" in (out / "table.md").read_text()
    main(file(text + points % (32, 32)))
    assert set(map(tuple, starts(out).values())) == {("0",)}
    assert numbers(out)["none"]["32"]["summary"]["n"] == 1


def test_a_report_from_some_cells_uses_the_seeds_of_both(file, out, capsys):
    flags = file()
    code, line = failure_of(main, [*flags, "--report"], capsys)
    assert (code, "has no finished cell of" in line) == (1, True)
    for cell in ("none/seed_0", "none/seed_1", "none/seed_2", "iRPE_k/seed_2", "iRPE_k/seed_1"):
        main([*flags, "--cell", cell])
    main([*flags, "--report"])
    text = (out / "table.md").read_text()
    missing = "iRPE q, seed 0; iRPE k, seed 0; iRPE q, seed 1; iRPE q, seed 2"
    assert sorted(text.partition("Missing: 4 of 9 metrics (")[2][: len(missing)].split("; ")) == (
        sorted(missing.split("; "))
    )
    found = numbers(out)
    assert found["iRPE k"][""]["difference"]["n"] == 2
    assert found["iRPE q"][""] == {"seeds": {}, "summary": None, "difference": None}
    assert "(n = 2)" in text


def test_printed_commands_run_the_cells(file, out, capsys):
    main([*file(EVALUATED.replace("seeds: [0, 1, 2]", "seeds: [4]")), "--print_commands"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    words = shlex.split(lines[1])
    assert words[:3] == [sys.executable, "-m", "scripts.ablate"]
    main(words[3:])
    assert list(starts(out)) == ["iRPE_k/seed_4"]
    result = json.loads((out / "iRPE_k/seed_4/result.json").read_text())
    assert list(result["evaluations"]) == ["32"]


def test_a_cell_waits_for_the_process_of_a_killed_command(file, out, capsys):
    folder = out / "none" / "seed_0"
    folder.mkdir(parents=True)
    (out / "ablation.json").write_text('{"name": "tiny", "file": {"trainer": "classification"}}')
    program = f"from pathlib import Path; from engine.folder_lock import lock_folder; import time; \
lock = lock_folder(Path({str(folder)!r})); print('locked', flush=True); time.sleep(1.5)"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        start = time.monotonic()
        main([*file(), "--cell", "none/seed_0"])
    assert time.monotonic() - start > 0.5
    assert "none, seed 0: waiting for another process: " in capsys.readouterr().out
    assert starts(out) == {"none/seed_0": ["0"]}


def test_torchrun_gets_a_free_port_and_keeps_a_given_one():
    words = Launcher("torchrun --nproc_per_node=2", 2).command("m")
    assert Path(words[0]).name == "torchrun"
    assert words[1:] == ["--nproc_per_node=2", "--standalone", "-m", "m"]
    fixed = ["--nproc_per_node=2", "--master_port=29501"]
    words = Launcher(shlex.join(["torchrun", *fixed]), 1).command("m", "x")
    assert words[1:] == [*fixed, "-m", "m", "x"]
    assert Launcher("", 1).command("m") == [sys.executable, "-m", "m"]


def test_cells_share_the_cores_unless_the_user_sets_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert Launcher("", 2).environment()["OMP_NUM_THREADS"] == "4"
    assert Launcher("", 16).environment()["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in Launcher("torchrun", 2).environment()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Launcher("", 2).environment()["OMP_NUM_THREADS"] == "3"


def command(*flags: str) -> subprocess.Popen:
    """Start the command as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.ablate", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    """Wait until a condition is true while a command runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_cells_after_a_checkpoint(number, file, out):
    flags = file(TINY.replace("epochs: 3", "epochs: 2000, layer_decay: 0.1"))
    process = command(*flags, "--jobs", "2")
    wait_for(lambda: len(list(out.rglob("checkpoint.pth"))) == 2, process)
    process.send_signal(number)
    text = process.communicate(timeout=100)[0]
    assert process.returncode == 128 + number
    assert "start the same command again to continue" in text
    assert "failed" not in text
    for path in out.rglob("seed_*"):
        # The trainers have ended, so nobody has their locks.
        lock_folder(path).close()
        assert path.joinpath("log.txt").read_text().count("\n") == int(
            path.joinpath("checkpoint.pth").read_text()
        )


@pytest.mark.slow
def test_a_command_killed_three_times_gives_the_same_table(file, out, tmp_path):
    flags = file(EVALUATED.replace("epochs: 3", "epochs: 12, layer_decay: 0.1"))
    generator = random.Random(0)
    for number in range(3):
        process = command(*flags, "--jobs", "2")
        before = len(list(out.rglob("log.txt")))
        wait_for(lambda before=before: len(list(out.rglob("log.txt"))) > before, process)
        time.sleep(generator.uniform(0, 1))
        process.kill()
        process.communicate()
        # Without this the trainers of the killed command end their cells.
        if number < 2:
            kill_trainers(out)
    process = command(*flags, "--jobs", "2")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    resumed = [epoch for epochs in starts(out).values() for epoch in epochs[1:]]
    assert any(0 < int(epoch) < 12 for epoch in resumed)
    unbroken = [flags[0], "--output_dir", str(tmp_path / "unbroken"), *flags[3:]]
    main([*unbroken, "--jobs", "2"])
    assert numbers(out) == numbers(tmp_path / "unbroken")
    tables = [(folder / "table.md").read_text() for folder in (out, tmp_path / "unbroken")]
    assert tables[0].partition("```bash")[0] == tables[1].partition("```bash")[0]


def kill_trainers(out: Path) -> None:
    """Kill the processes that have the lock of a cell."""
    for path in out.rglob("seed_*/.run.lock"):
        process = int(path.read_text().split()[1])
        folder = str(path.parent).encode()
        with contextlib.suppress(OSError):
            if folder in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0"):
                os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_cells_of_the_real_trainer_are_trained_and_evaluated(tmp_path):
    text = TINY.replace("nowhere", str(tmp_path / "digits")).replace("epochs: 3", "epochs: 1")
    text = text.replace("seeds: [0, 1, 2]", "seeds: [0]").replace("num_heads: 2", "num_heads: 2, "
        "batch_size: 64, num_workers: 0, max_steps: 6, logger: none, model_ema: false")  # fmt: skip
    text += "evaluate_at: {label: size, points: {24: {}, 20: {input_size: 20}}}\n"
    (tmp_path / "real.yaml").write_text(text)
    out = tmp_path / "out"
    main([str(tmp_path / "real.yaml"), "--output_dir", str(out), "--device", "cpu"])
    content = json.loads((out / "results.json").read_text())
    for variant, folder in (("none", "none"), ("iRPE k", "iRPE_k")):
        result = json.loads((out / folder / "seed_0/result.json").read_text())
        points = content["variants"][variant]["points"]
        assert points["24"]["seeds"] == {"0": result["metrics"]["test_acc1"]}
        evaluated = json.loads((out / folder / "seed_0/evaluate/20/eval.json").read_text())
        assert points["20"]["seeds"] == {"0": evaluated["test_acc1"]}
        assert result["classes"] == 10
    assert (out / "plot.png").stat().st_size > 5000
