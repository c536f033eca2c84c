"""The checkpoint of a trained model in the formats of other projects, and its metrics."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["evaluation", "write_origins"]


def write_origins(checkpoint: Path, folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Write a checkpoint in every format; return the files by name, `ours` among them.

    Args:
        checkpoint: A file that a trainer of this project wrote.
        folder: Folder of the new files.
        args: The `args` of the checkpoints in the format of the originals.
    """
    ours = torch.load(checkpoint, weights_only=True)
    model = ours["model"]
    training = ("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler")
    plain = {key: value for key, value in model.items() if "lookup_table" not in key}
    ema = {"model_ema": plain} if ours["model_ema"] is not None else {}
    contents = {
        "original-training": {name: ours[name] for name in training} | {"args": args},
        "original-release": {"model": model, "args": args},
        "plain-release": {"model": plain},
        "plain-training": ours | {"model": plain} | ema,
        "bare": model,
        "wrapped": {"model": {f"module.{key}": value for key, value in model.items()}},
    }
    paths = {name: folder / f"{name}.pth" for name in contents}
    for name, content in contents.items():
        torch.save(content, paths[name])
    paths |= {"ours": checkpoint, "safetensors": folder / "model.safetensors"}
    save_file(model, paths["safetensors"])
    return paths


def evaluation(main: Callable[[list[str]], None], folder: Path, *argv: str) -> dict[str, float]:
    """Run a trainer with `--eval`; return the metrics that it writes into its output folder."""
    main([*argv, "--eval", "--output_dir", str(folder)])
    record = json.loads((folder / "eval.json").read_text())
    return {name: value for name, value in record.items() if name.startswith("test_")}
