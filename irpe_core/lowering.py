"""Lowering of exported programs: the operators of iRPE become standard operators of PyTorch.

`torch.export` keeps the operators of `rpe_ops` and `irpe_core` as single nodes, which other
exporters and processes without these packages cannot run. After lowering, a gather is
`aten.gather`, a bucket sum is `aten.scatter_add`, and bucket ids are integer arithmetic on the
height and width of the grid, which may be symbolic. All layers share the bucket ids of a grid.
"""

from collections.abc import Callable, Mapping

import torch
from torch.export import ExportedProgram

from irpe_core import buckets
from rpe_ops import reference

__all__ = ["lower"]

_BUCKET_IDS = torch.ops.irpe_core.bucket_ids.default
_DECOMPOSITIONS: dict[Callable, Callable] = {
    _BUCKET_IDS: buckets.compute_bucket_ids,
    torch.ops.irpe_core.axis_offsets.default: buckets.compute_axis_offsets,
    torch.ops.rpe_ops.gather.default: lambda lookup, index, _: reference.gather(lookup, index),
    torch.ops.rpe_ops.bucket_sum.default: lambda pairs, index, num_buckets, _: reference.bucket_sum(
        pairs, index, num_buckets
    ),
}


def lower(
    program: ExportedProgram, decompositions: Mapping[Callable, Callable] | None = None
) -> ExportedProgram:
    """Replace the operators of iRPE in a program by standard operators, for inference.

    Args:
        program: A model with encodings, exported after `set_implementation(model, "reference",
            device)`, which composes attention of small operators. This program is changed too:
            layers with the same grid then share their bucket ids.
        decompositions: Further decompositions, as for `ExportedProgram.run_decompositions`.

    Returns:
        A new program that computes the same and needs neither `irpe_core` nor `rpe_ops`.

    Raises:
        ValueError: The program holds fused attention, which cannot be lowered.
    """
    first_uses: dict[tuple, torch.fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.target is not _BUCKET_IDS:
            continue
        # This fills the cache of piecewise_steps. The decomposition below runs on symbolic tensors,
        # which have no values from which the steps could be computed.
        buckets.piecewise_steps(node.args[4])
        first = first_uses.setdefault(node.args, node)
        if node is not first:
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)
    program = program.run_decompositions({**_DECOMPOSITIONS, **(decompositions or {})})
    for node in program.graph.nodes:
        if str(node.target).startswith(("rpe_ops", "irpe_core")):
            raise ValueError(
                f"the program holds {node.target}, which cannot be lowered: call "
                'set_implementation(model, "reference", device) before torch.export.export'
            )
    return program
