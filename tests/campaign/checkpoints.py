"""Cases of checkpoints: damaged bytes, entries of a wrong kind, and payloads."""

import os
import random
import zipfile
from pathlib import Path
from typing import Any

import torch

from classification.main import main as classify
from classification.predict import main as predict_classes
from detection.main import main as detect
from detection.predict import main as predict_boxes
from tests.campaign.base import CLASSIFIER, DETECTOR, Base
from tests.campaign.mutations import HOSTILE, mutate_bytes, mutate_value
from tests.campaign.oracle import Verdict, trial

__all__ = ["checkpoints_case"]

_CULPRITS = ("checkpoint", "input", "classes", "label_to_category", "lr_scheduler", "optimizer")


class _Payload:
    """An object whose unpickling creates the file `ran` in the working directory."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def checkpoints_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Mutate a checkpoint and evaluate, resume, fine-tune or predict with it."""
    task = rng.choice(("classifier", "detector"))
    output = folder / "output"
    path = output / "checkpoint.pth"
    output.mkdir(parents=True)
    source = getattr(base, task) / "checkpoint.pth"
    kind = rng.choice(("bytes", "entry", "entry", "entry", "weight", "payload"))
    if kind == "bytes":
        path.write_bytes(mutate_bytes(rng, source.read_bytes()))
    else:
        content = torch.load(source, weights_only=True)
        entry = rng.choice([key for key in content if key != "model"])
        if kind == "entry":
            few = {entry: content[entry]} if rng.random() < 0.8 else dict(content)
            content |= mutate_value(rng, few, (*HOSTILE, *_tensors(rng)))[0]
        elif kind == "weight":
            weights = content[rng.choice(("model", "optimizer"))]
            weights = weights if "state" not in weights else weights["state"][0]
            key = rng.choice(list(weights))
            weights[key] = rng.choice((*_tensors(rng, weights[key]), *HOSTILE))
        else:
            content[entry] = _Payload()
        form = rng.choice(("zip",) * 8 + ("old", "compressed"))
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
        if form == "compressed":
            _compress(path)
    planted = [output / "notes.txt", output / "checkpoint_9999.pth"]
    for file in planted:
        file.write_text("a file of the user")
    command, argv = _use(rng, task, base, path)
    # A resumed training replaces the checkpoint.
    kept = [*planted, *base.folders] + ([] if "--auto_resume" in argv else [path])
    return trial(folder, command, argv, culprits=_CULPRITS, kept=kept)


def _use(rng: random.Random, task: str, base: Base, path: Path) -> tuple[Any, list[str]]:
    """Return a command that reads the checkpoint, and its flags."""
    is_classifier = task == "classifier"
    command, flags = (classify, CLASSIFIER) if is_classifier else (detect, DETECTOR)
    place = ("--data_path", base.images) if is_classifier else ("--coco_path", base.scenes)
    flags = [*flags, place[0], str(place[1])]
    use = rng.choice(("resume", "resume", "eval", "finetune", "predict"))
    if use == "resume":
        return command, [*flags, "--max_steps=2", "--output_dir", str(path.parent), "--auto_resume"]
    if use == "eval":
        return command, [*flags, "--eval", "--resume", str(path)]
    if use == "finetune":
        return command, [*flags, "--max_steps=1", "--finetune", str(path)]
    image = base.images / "val" / "a" / "0.png"
    command = predict_classes if is_classifier else predict_boxes
    return command, [str(path), str(image), "--num_workers=0", "--device=cpu"]


def _tensors(rng: random.Random, own: Any = None) -> list[torch.Tensor]:
    """Return tensors of wrong shapes, types, layouts and values."""
    if not isinstance(own, torch.Tensor) or not own.is_floating_point() or own.dim() == 0:
        own = torch.ones(2, 3)
    return [
        *(own * float("nan"), own * 1e30, own * float("inf"), own[:0], own.flatten()[:1]),
        *(own.double(), own.long(), own.bool(), own.to(torch.complex64), own.half()),
        *(own.to(torch.float8_e4m3fn), own.to_sparse(), own[None], torch.tensor(1.0)),
        *(torch.zeros(1).expand(rng.choice((10, 10**6, 10**10))), torch.zeros(0, 10**9)),
        own.to("meta"),
    ]


def _compress(path: Path) -> None:
    """Write the zip of a checkpoint again, compressed, with a member of many zeros."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content + b"\0" * (50 << 20 if name.endswith("data/0") else 0))
