"""The weights and inputs of the recorded numbers (`tests/golden/RECIPE.md`), and their files."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["GOLDEN", "golden", "golden_json", "input_a", "input_b", "recipe_a", "recipe_b", "fill"]

GOLDEN = Path(__file__).parent / "golden"

_NORM_WEIGHT = re.compile(
    r"norm[123]?\.weight$|downsample\.1\.weight$|(^|\.)bn\d*\.weight$",
)


def golden(name: str) -> np.lib.npyio.NpzFile:
    """Open the arrays of `tests/golden/{name}.npz`; each is read on access."""
    return np.load(GOLDEN / f"{name}.npz")


def golden_json(name: str) -> dict:
    """Read `tests/golden/{name}.json`."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def input_a(*shape: int) -> Tensor:
    """Return the smooth input, float64."""
    return torch.from_numpy(np.sin(np.arange(np.prod(shape)) * 0.01 + 0.5)).reshape(shape)


def input_b(*shape: int, seed: int = 1234) -> Tensor:
    """Return the random input, float64."""
    values = np.random.RandomState(seed).standard_normal(int(np.prod(shape)))
    return torch.from_numpy(values).reshape(shape)


def recipe_a(key: str, shape: tuple[int, ...], factor: float = 0.02) -> Tensor:
    """Return a value of recipe A, float64; it detects wrong names and shapes.

    The factor is 1 for encodings that are tested alone.
    """
    s = np.sin(np.arange(np.prod(shape)) * 0.37 + zlib.crc32(key.encode()) % 1000)
    if key.endswith("running_var"):
        s = 1 + 0.1 * np.abs(s)
    else:
        s = factor * s + bool(_NORM_WEIGHT.search(key))
    return torch.from_numpy(s).reshape(shape)


def recipe_b(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return a value of recipe B, float64; it detects wrong encodings."""
    size = int(np.prod(shape))
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(size)
    if key.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    elif _NORM_WEIGHT.search(key):
        z = 1 + 0.1 * z
    elif "lookup_table" in key:
        z = 0.3 * z
    elif key.endswith(("pos_embed", "cls_token", "dist_token")):
        z = 0.2 * z
    elif key.endswith("query_embed.weight"):
        z = 4 * z
    elif len(shape) <= 1:
        z = 0.05 * z
    else:
        z = _detr_factor(key, shape) * (z / np.sqrt(size / shape[0])).reshape(shape)
    return torch.from_numpy(np.asarray(z)).reshape(shape)


def _detr_factor(key: str, shape: tuple[int, ...]) -> float | np.ndarray:
    """Return the factor of a weight; factors other than 1, all of DETR, make its queries differ."""
    if key.endswith("input_proj.weight"):
        return 8.0
    if "encoder" in key and key.endswith("self_attn.out_proj.weight"):
        return 0.5
    if "decoder" in key and key.endswith("self_attn.out_proj.weight"):
        return 0.2
    if key.endswith("multihead_attn.out_proj.weight"):
        return 3.0
    if "decoder" in key and key.endswith("in_proj_weight"):
        rows = np.arange(shape[0]) < 2 * (shape[0] // 3)
        return np.where(rows, 2.0, 1.0)[:, None]
    return 1.0


def fill(module: nn.Module, recipe=recipe_b, **options: float) -> nn.Module:
    """Set every floating-point entry of the state dict by a recipe, in place; return `module`."""
    with torch.no_grad():
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(recipe(key, tuple(value.shape), **options))
    return module
