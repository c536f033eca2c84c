"""Every block of the documents runs, or is checked by the program that would run it."""

import contextlib
import io
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from classification.config import ClassificationConfig
from detection import saved
from detection.build import build_network
from detection.config import DetectionConfig
from engine import dump
from scripts.ablate.cells import load_ablation
from tests.detection.models import SMALL, config
from tests.docs.commands import Command, CommandError, check, commands_of

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "*/README.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "yaml", "text", "bibtex"}
# The expected output is in a comment after the call, or on comment lines below it.
BEHIND = re.compile(r"^\s*print\(.*\)  # (.*)$")
BELOW = re.compile(r"^# (.*)$")
# Lines of a trainer's log are not compared.
LOGGED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


def blocks(document: str, language: str) -> list[str]:
    found = BLOCK.findall((ROOT / document).read_text())
    return [block for word, block in found if word == language]


def those_with(language: str) -> list[str]:
    return [document for document in DOCUMENTS if blocks(document, language)]


def promised(block: str) -> list[str]:
    """Return the lines that the comments of a block say it prints."""
    found, printing = [], False
    for line in block.splitlines():
        match = BEHIND.match(line) or (printing and BELOW.match(line))
        if match:
            found.append(match[1])
        printing = bool(match) or "print(" in line
    return found


def run(document: str) -> None:
    """Execute the Python blocks of a document in one namespace."""
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks(document, "python"), 1):
        # Published weights would be downloaded, but not those that the block itself saves.
        saves = "save_for_hf" in block or "save_pretrained" in block
        code = block if saves else block.replace("pretrained=True", "pretrained=False")
        if "ViTForImageClassification" in code and not find_spec("transformers"):
            continue  # it is optional
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, f"{document}, block {number}", "exec"), namespace)
        printed = [line for line in output.getvalue().splitlines() if not LOGGED.match(line)]
        assert printed == promised(block), block


def provide_files(folder: Path) -> None:
    """Write the files that blocks read: a photograph and the checkpoint of a detector."""
    Image.effect_noise((64, 48), 60).convert("RGB").save(folder / "photo.jpg")
    options = config(f"{SMALL} --image_size 64")
    described = saved.describe(options, list("abcde"), {n: n + 1 for n in range(5)})
    content = {"model": build_network(options).state_dict(), "args": dump(options), **described}
    (folder / "output").mkdir()
    torch.save(content, folder / "output" / "best_checkpoint.pth")


def test_a_wrong_promise_is_seen(tmp_path, monkeypatch):
    text = "```python\nx = 1\nprint(x)  # 1\n```\n\n```python\nfor i in (x, 3):\n    print(i)\n"
    (tmp_path / "a.md").write_text(f"{text}# 1\n# 3\n```\n")
    (tmp_path / "b.md").write_text(f"{text}# 1\n# 2\n```\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    run("a.md")
    with pytest.raises(AssertionError):
        run("b.md")


@pytest.mark.parametrize("document", those_with("python"))
@pytest.mark.filterwarnings("ignore:.*nested.tensor")
def test_python_blocks_run_and_print_what_they_say(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    provide_files(tmp_path)
    run(document)


def check_all(block: str) -> None:
    """Check the commands of a bash block."""
    for command in commands_of(block):
        check(command)


@pytest.mark.parametrize("document", those_with("bash"))
def test_commands_are_accepted(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(document, "bash"):
        assert "…" not in block, "a block is pasted whole"
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        check_all(block)


@pytest.mark.parametrize("document", those_with("yaml"))
def test_yaml_blocks_are_configurations(document, tmp_path):
    for block in blocks(document, "yaml"):
        options = yaml.safe_load(block)
        if "variants" in options:
            (tmp_path / "ablation.yaml").write_text(block)
            load_ablation(str(tmp_path / "ablation.yaml"))
            continue
        detects = not options.keys() <= ClassificationConfig.model_fields.keys()
        (DetectionConfig if detects else ClassificationConfig).model_validate(options)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_names_a_language_that_is_checked(document):
    text = (ROOT / document).read_text()
    found = BLOCK.findall(text)
    assert {word for word, _ in found} <= LANGUAGES
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE))
    rest = BLOCK.sub("", text)
    hidden = r"^ {4,}(\w+=\S+ )*(python3? -m|torchrun|bash|pip|sbatch) .*"
    assert not re.findall(hidden, rest, re.MULTILINE)


def test_comments_continued_lines_variables_and_folders_are_understood():
    block = (
        "# a comment\n"
        "A=1 B='2 3' torchrun -m x \\\n    --flag \"\"  # another\n"
        "cd rpe_ops && python setup.py install --user\n"
    )
    assert list(commands_of(block)) == [
        Command(["torchrun", "-m", "x", "--flag", ""], {"A": "1", "B": "2 3"}),
        Command(["python", "setup.py", "install", "--user"], {}, ROOT / "rpe_ops"),
    ]


CONFIG = "configs/detection/detr_r50.yaml"
SOUND = [
    "torchrun --nproc_per_node=8 -m detection.main --coco_path ./coco_data",
    f"python -m detection.main --config {CONFIG}",
    "python -m classification.main --batch-size 8",
    f"GPUS=2 bash scripts/train_detection.sh {CONFIG} --coco-path ./coco_data",
    f"sbatch --nodes=2 scripts/slurm_detection.sbatch {CONFIG} --output_dir /runs/a",
    "python -m scripts.zoo evaluate --coco ./coco_data --rows detection",
    "python -m scripts.benchmark ops --rounds 3",
    "python -m classification.predict a.pth photos --topk 3",
    "python -m detection.predict a.pth photo.jpg --output_dir out",
    "python -m scripts.export --checkpoint a.pth --output a.onnx",
    "python -m scripts.inspect a.pth --image a.jpg --query 3 5",
    "python -m examples.draw_buckets --checkpoint a.pth",
    "python -m examples.equip_timm_vit --epochs 2",
    "python -m rpe_ops",
    "pip install ./rpe_ops",
    "pip install -r requirements.txt -c constraints.txt",
]


@pytest.mark.parametrize("line", SOUND)
def test_a_misspelled_flag_is_seen(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = commands_of(line)
    check(command)
    (misspelled,) = commands_of(f"{line} --no-such-flag 1")
    with pytest.raises(CommandError):
        check(misspelled)


@pytest.mark.parametrize(
    "line",
    [
        "torchrun --nprocs=8 -m detection.main",
        "torchrun detection/main.py",
        "torchrun -m detection.mian",
        "python -m detection.main --config configs/detection/none.yaml",
        "python -m detection.main --print_config --lr fast",
        "python -m classification.main --model deit_none",
        "bash scripts/train_detection.sh configs/detection/none.yaml",
        "NODES=2 bash scripts/train_detection.sh configs/detection/detr_r50.yaml",
        "sbatch scripts/none.sbatch configs/detection/detr_r50.yaml",
        "bash scripts/none.sh",
        "python -m scripts.zoo evaluate --rows none",
        "python -m scripts.benchmark none",
        "pip install ./none",
        "pip install -r none.txt",
        "python -m pytest tests/none",
        "cd none && python setup.py install",
        "echo a > b",
        "make all",
    ],
)
def test_a_command_that_would_fail_is_seen(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(CommandError):
        check_all(line)


def test_the_ablation_of_the_documents_is_the_file_of_the_examples():
    block = blocks("docs/ablate.md", "yaml")[0]
    assert (ROOT / "examples/ablation.yaml").read_text().endswith(f"\n\n{block}")
