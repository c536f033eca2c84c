"""Exported models (`.onnx`, `.pt2`) as functions, and the metadata in their files.

Metadata are plain values by name. An ONNX file has them as its metadata properties: text as it is,
other values as JSON. A `.pt2` file has them in its extra file `metadata.json`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError

__all__ = ["EXPORTED", "METADATA_FILE", "ExportedModel", "onnx_properties", "open_exported"]

EXPORTED = (".onnx", ".pt2")
METADATA_FILE = "metadata.json"


@dataclass(frozen=True)
class ExportedModel:
    """An exported model on the CPU, called as the model that it was made from.

    Attributes:
        run: Function from inputs to the output, a dict by name if there are several.
        metadata: Metadata in the file; empty if it has none.
    """

    run: Callable[..., Tensor | dict[str, Tensor]]
    metadata: Mapping[str, Any]

    def __call__(self, *inputs: Tensor) -> Tensor | dict[str, Tensor]:
        """Run the model."""
        return self.run(*inputs)


def open_exported(path: str | Path) -> ExportedModel:
    """Open a `.onnx` or `.pt2` file.

    Unpickling a `.pt2` file can run code in it, so it must come from a trusted source.

    Raises:
        UserError: The file is missing, damaged or of another kind, or a package is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"exported model {str(path)!r} does not exist")
    return _open_onnx(path) if path.suffix == ".onnx" else _open_pt2(path)


def onnx_properties(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as the properties of an ONNX file."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in metadata.items()
    }


def _open_onnx(path: Path) -> ExportedModel:
    """Open an ONNX file in onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs onnxruntime ({error}): pip install onnxruntime") from error
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # The errors of onnxruntime have no base class of their own.
    except Exception as error:
        raise UserError(f"onnxruntime cannot read {path}: {error}") from error
    inputs = [node.name for node in session.get_inputs()]
    outputs = [node.name for node in session.get_outputs()]

    def run(*tensors: Tensor) -> Tensor | dict[str, Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        found = dict(zip(outputs, map(torch.from_numpy, session.run(outputs, feeds)), strict=True))
        return found if len(outputs) > 1 else found[outputs[0]]

    properties = session.get_modelmeta().custom_metadata_map
    return ExportedModel(run, {name: _parsed(text) for name, text in properties.items()})


def _open_pt2(path: Path) -> ExportedModel:
    """Open a `.pt2` file with `torch.export`."""
    files = {METADATA_FILE: ""}
    try:
        with path.open("rb") as file:
            module = torch.export.load(file, extra_files=files).module()
    # For a damaged file torch raises exceptions of many kinds.
    except Exception as error:
        raise UserError(f"torch.export cannot read {path}: {error}") from error
    return ExportedModel(module, json.loads(files[METADATA_FILE] or "{}"))


def _parsed(text: str) -> Any:
    """Return the value of an ONNX property."""
    try:
        return json.loads(text)
    except ValueError:
        return text
