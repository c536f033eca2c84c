"""Trace a model, write it in standard operators alone, and compare the file with the model.

`.pt2` is `torch.export`'s format and is loaded without this repository; `.onnx` is checked in
onnxruntime. Both come from one program, in which iRPE's buckets are a function of the map's size.
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
    """A model and what an exporter has to know of it."""

    model: nn.Module
    """Gives a tensor, or a dict of them."""
    inputs: dict[str, dict[int, str]]
    """Their names, and the dynamic axes of each with their names."""
    outputs: tuple[str, ...]
    """Their names."""
    samples: Callable[[], Iterable[tuple[Tensor, ...]]]
    """Inputs to trace and compare with, and others to compare with."""


def export(subject: Exportable, output: Path, opset: int = 18) -> float:
    """Trace, lower, write and compare.

    Args:
        subject: Its model is put into evaluation mode, without gradients.
        output: Ends in `.pt2` or `.onnx`; it is replaced in one move, or stays as it was.
        opset: Version of ONNX's operators.

    Returns:
        The largest absolute difference from the model over all outputs and samples.

    Raises:
        UserError: The difference is above 1e-4, the model cannot be written in this opset, or the
            file cannot be written.
    """
    torch.manual_seed(0)
    samples = list(subject.samples())
    program = _trace(subject, samples[0])
    as_onnx = output.suffix == ".onnx"
    content = _to_onnx(program, subject, opset) if as_onnx else _to_pt2(program)
    with replacing(output) as temporary:
        temporary.write_bytes(content)
        predict = (_open_onnx if as_onnx else _open_pt2)(temporary, subject.outputs)
        difference = _largest_difference(subject, predict, samples)
        # Not a number is not below it either.
        if not difference <= TOLERANCE:
            raise UserError(
                f"the exported model differs from the model by {difference:.2g}, more than "
                f"{TOLERANCE:g}: {output} is not written"
            )
    return difference


def _trace(subject: Exportable, sample: tuple[Tensor, ...]) -> ExportedProgram:
    model = subject.model.eval().requires_grad_(False)
    dynamic = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in subject.inputs.values())
    set_implementation(model, "reference", "cpu")
    with torch.no_grad():
        program = torch.export.export(model, sample, dynamic_shapes=dynamic)
    set_implementation(model, "auto", "cpu")
    # At some sizes onnxruntime's Resize takes the pixel beside, which would move DETR's padding.
    nearest = torch.ops.aten.upsample_nearest2d
    program = lower(program, get_decompositions([nearest.vec, nearest.default]))
    for node in program.graph.nodes:
        # Names paths of this machine.
        node.meta.pop("stack_trace", None)
    return program


def _largest_difference(
    subject: Exportable, predict: Predict, samples: list[tuple[Tensor, ...]]
) -> float:
    differences = []
    with torch.no_grad():
        for sample in samples:
            expected = _by_name(subject.model(*sample), subject.outputs)
            found = predict(*sample)
            differences += [(found[name] - expected[name]).abs().max() for name in subject.outputs]
    return torch.stack(differences).max().item()


def _by_name(result: Tensor | dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {names[0]: result} if isinstance(result, Tensor) else result


def _to_pt2(program: ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _open_pt2(path: Path, outputs: tuple[str, ...]) -> Predict:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda *inputs: _by_name(module(*inputs), outputs)


def require_onnx() -> None:
    """Raise UserError where a package for ONNX is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ONNX needs the packages of {REQUIREMENTS} ({error}): pip install -r {REQUIREMENTS}"
        ) from error


def _to_onnx(program: ExportedProgram, subject: Exportable, opset: int) -> bytes:
    # It names every operator that it cannot compute beforehand.
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Two inputs share an axis, and its name.
        warnings.filterwarnings("ignore", "# The axis name")
        exported = torch.onnx.export(
            program,
            input_names=list(subject.inputs),
            output_names=list(subject.outputs),
            dynamic_shapes=tuple(subject.inputs.values()),
            opset_version=opset,
            verbose=False,
        )
    written = exported.model.opset_imports[""]
    if written != opset:
        raise UserError(f"this model cannot be written in opset {opset}, but in {written}")
    return exported.model_proto.SerializeToString()


def _open_onnx(path: Path, outputs: tuple[str, ...]) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def predict(*inputs: Tensor) -> dict[str, Tensor]:
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        arrays = session.run(list(outputs), feeds)
        return {name: torch.from_numpy(a) for name, a in zip(outputs, arrays, strict=True)}

    return predict
