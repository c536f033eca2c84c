"""Trace a model, write it in standard operators only, and compare the file with the model.

`.pt2` is the format of `torch.export`; it is loaded without this repository. `.onnx` is checked in
onnxruntime. Both are made from one program, which computes bucket ids from the size of its inputs.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.export import Dim, ExportedProgram

from engine import UserError, replacing
from engine.exported import METADATA_FILE, ExportedModel, onnx_properties, open_exported
from irpe_core import set_implementation
from irpe_core.lowering import lower

__all__ = ["TOLERANCE", "Exportable", "export", "require_onnx"]

TOLERANCE = 1e-4
REQUIREMENTS = "requirements-export.txt"


class Exportable(NamedTuple):
    """A model with names of its inputs and outputs, and sample inputs."""

    model: nn.Module
    """Model that returns a tensor or a dict of tensors."""
    inputs: dict[str, dict[int, str]]
    """Input name → dynamic axes → axis name."""
    outputs: tuple[str, ...]
    """Output names."""
    samples: Callable[[], Iterable[tuple[Tensor, ...]]]
    """Function that returns sample inputs. All are compared; the first is also traced."""
    metadata: Mapping[str, Any] = {}
    """Plain values to record in the file, such as the class names."""


def export(exportable: Exportable, output: Path, opset: int = 18) -> float:
    """Export a model to a file and compare the file with the model.

    Args:
        exportable: The model, which is put into evaluation mode without gradients.
        output: Path ending in `.pt2` or `.onnx`. An existing file is replaced only on success.
        opset: ONNX opset version.

    Returns:
        The largest absolute difference from the model over all outputs and samples.

    Raises:
        UserError: The difference is above 1e-4, the model cannot be written in this opset, or the
            file cannot be written.
    """
    torch.manual_seed(0)
    samples = list(exportable.samples())
    program = _trace(exportable, samples[0])
    as_onnx = output.suffix == ".onnx"
    content = _to_onnx(program, exportable, opset) if as_onnx else _to_pt2(program, exportable)
    with replacing(output, suffix=output.suffix) as temporary:
        temporary.write_bytes(content)
        difference = _largest_difference(exportable, open_exported(temporary), samples)
        # Written with `not`, so that NaN fails too.
        if not difference <= TOLERANCE:
            raise UserError(
                f"the exported model differs from the model by {difference:.2g}, more than "
                f"{TOLERANCE:g}: {output} is not written"
            )
    return difference


def _trace(exportable: Exportable, sample: tuple[Tensor, ...]) -> ExportedProgram:
    """Trace the model on one sample and lower it to standard operators."""
    model = exportable.model.eval().requires_grad_(False)
    dynamic = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in exportable.inputs.values())
    set_implementation(model, "reference", "cpu")
    with torch.no_grad():
        program = torch.export.export(model, sample, dynamic_shapes=dynamic)
    set_implementation(model, "auto", "cpu")
    # At some sizes onnxruntime's Resize rounds to the neighboring pixel, which would shift the
    # padding mask of DETR.
    nearest = torch.ops.aten.upsample_nearest2d
    program = lower(program, get_decompositions([nearest.vec, nearest.default]))
    for node in program.graph.nodes:
        # A stack trace contains local paths, which must not be written to the file.
        node.meta.pop("stack_trace", None)
    return program


def _largest_difference(
    exportable: Exportable, exported: ExportedModel, samples: list[tuple[Tensor, ...]]
) -> float:
    """Return the largest absolute difference from the model over all outputs and samples."""
    differences = []
    with torch.no_grad():
        for sample in samples:
            expected = _by_name(exportable.model(*sample), exportable.outputs)
            found = _by_name(exported(*sample), exportable.outputs)
            differences += [
                (found[name] - expected[name]).abs().max() for name in exportable.outputs
            ]
    return torch.stack(differences).max().item()


def _by_name(result: Tensor | dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the outputs of a model by their names."""
    return {names[0]: result} if isinstance(result, Tensor) else result


def _to_pt2(program: ExportedProgram, exportable: Exportable) -> bytes:
    """Serialize a program for `torch.export.load`."""
    file = io.BytesIO()
    metadata = json.dumps(exportable.metadata, ensure_ascii=False)
    torch.export.save(program, file, extra_files={METADATA_FILE: metadata})
    return file.getvalue()


def require_onnx() -> None:
    """Raise UserError if a package that ONNX needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ONNX needs the packages of {REQUIREMENTS} ({error}): pip install -r {REQUIREMENTS}"
        ) from error


def _to_onnx(program: ExportedProgram, exportable: Exportable, opset: int) -> bytes:
    """Serialize a program as ONNX.

    Raises:
        UserError: The model cannot be written in this opset.
    """
    # onnxscript warns about every operator that its constant folding skips.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # torch warns that `images` and `mask` use the same axis names, which is intended.
        warnings.filterwarnings("ignore", "# The axis name")
        exported = torch.onnx.export(
            program,
            input_names=list(exportable.inputs),
            output_names=list(exportable.outputs),
            dynamic_shapes=tuple(exportable.inputs.values()),
            opset_version=opset,
            verbose=False,
        )
    written = exported.model.opset_imports[""]
    if written != opset:
        raise UserError(f"this model cannot be written in opset {opset}, but in {written}")
    proto = exported.model_proto
    for name, value in onnx_properties(exportable.metadata).items():
        proto.metadata_props.add(key=name, value=value)
    return proto.SerializeToString()
