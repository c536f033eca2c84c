"""A trainer without torch, for tests of scripts.ablate: `--launcher "python ablate_trainer.py"`.

It has the interface of the trainers that the command uses: a line of log.txt per epoch, a
checkpoint, --auto_resume, the lock of the output folder, SIGTERM and errors of one line. The
metrics are numbers computed from the options. The seconds of an epoch are `layer_decay`, and a
`clip_grad` of 13 fails in the last epoch, as does the evaluation at 40 pixels.
"""

import json
import random
import signal
import sys
import time
from pathlib import Path

import yaml

from engine.folder_lock import lock_folder

GAIN = {"": 0.0, "rpe-1.9-product-ctx-1-k": 6.0, "rpe-1.9-product-ctx-1-q": 0.0}


def metrics(options: dict, epoch: int) -> dict[str, float]:
    """Return invented metrics."""
    noise = random.Random(f"{options.get('rpe', '')}{options['seed']}").gauss(0, 1)
    acc1 = 50 + epoch + noise + GAIN[options.get("rpe", "")] + options.get("input_size", 24) / 10
    return {"test_acc1": acc1, "test_acc5": 99.0, "test_loss": 100 / acc1}


def train(options: dict, folder: Path) -> None:
    """Train from the last checkpoint to the last epoch."""
    lock = lock_folder(folder)
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    checkpoint, log = folder / "checkpoint.pth", folder / "log.txt"
    epoch = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with (folder / "starts.txt").open("a") as starts:
        starts.write(f"{epoch}\n")
    while epoch < options["epochs"]:
        time.sleep(options.get("layer_decay", 0))
        if options.get("clip_grad") == 13 and epoch == options["epochs"] - 1:
            sys.exit("error: the loss must be finite, got nan")
        record = {"epoch": epoch, "n_parameters": 41_418, "train_loss": 2.0}
        record |= {"train_images_per_s": 100.0, **metrics(options, epoch)}
        lines = log.read_text().splitlines() if log.exists() else []
        text = "".join(f"{line}\n" for line in [*lines[:epoch], json.dumps(record)])
        log.with_name(".log").write_text(text)
        log.with_name(".log").replace(log)
        epoch += 1
        (folder / ".checkpoint").write_text(str(epoch))
        (folder / ".checkpoint").replace(checkpoint)
        if stopped:
            sys.exit(128 + stopped[0])
    del lock


def main(module: str, *words: str) -> None:
    """Train, or evaluate each file of options."""
    if module == "scripts.ablate.evaluate":
        for path in (word for word in words[1:] if word.endswith(".yaml")):
            options = yaml.safe_load(Path(path).read_text())
            if options["input_size"] == 40:
                sys.exit("error: the evaluation failed")
            assert Path(options["resume"]).read_text() == str(options["epochs"])
            text = json.dumps(metrics(options, options["epochs"] - 1))
            (Path(options["output_dir"]) / "eval.json").write_text(text)
        return
    assert "--auto_resume" in words
    options = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    train(options, Path(words[words.index("--output_dir") + 1]))


if __name__ == "__main__":
    assert sys.argv[1] == "-m"
    main(*sys.argv[2:])
