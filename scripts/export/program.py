"""Trace a model, write it in standard operators only, and compare the file with the model.

`.pt2` is the format of `torch.export`; it is loaded without this repository. `.onnx` is checked in
onnxruntime. Both are made from one program, which computes bucket ids from the size of its inputs.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.export import Dim, ExportedProgram

from engine import UserError, replacing
from irpe_core import set_implementation
from irpe_core.lowering import lower

__all__ = ["TOLERANCE", "Exportable", "export", "require_onnx"]

TOLERANCE = 1e-4
REQUIREMENTS = "requirements-export.txt"

Predict = Callable[..., dict[str, Tensor]]


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
    content = _to_onnx(program, exportable, opset) if as_onnx else _to_pt2(program)
    with replacing(output) as temporary:
        temporary.write_bytes(content)
        predict = (_open_onnx if as_onnx else _open_pt2)(temporary, exportable.outputs)
        difference = _largest_difference(exportable, predict, samples)
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
    exportable: Exportable, predict: Predict, samples: list[tuple[Tensor, ...]]
) -> float:
    """Return the largest absolute difference from the model over all outputs and samples."""
    differences = []
    with torch.no_grad():
        for sample in samples:
            expected = _by_name(exportable.model(*sample), exportable.outputs)
            found = predict(*sample)
            differences += [
                (found[name] - expected[name]).abs().max() for name in exportable.outputs
            ]
    return torch.stack(differences).max().item()


def _by_name(result: Tensor | dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the outputs of a model by their names."""
    return {names[0]: result} if isinstance(result, Tensor) else result


def _to_pt2(program: ExportedProgram) -> bytes:
    """Serialize a program for `torch.export.load`."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _open_pt2(path: Path, outputs: tuple[str, ...]) -> Predict:
    """Load a `.pt2` file as a function from inputs to outputs by name."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda *inputs: _by_name(module(*inputs), outputs)


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
    return exported.model_proto.SerializeToString()


def _open_onnx(path: Path, outputs: tuple[str, ...]) -> Predict:
    """Load an `.onnx` file as a function from inputs to outputs by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def predict(*inputs: Tensor) -> dict[str, Tensor]:
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        arrays = session.run(list(outputs), feeds)
        return {name: torch.from_numpy(a) for name, a in zip(outputs, arrays, strict=True)}

    return predict
