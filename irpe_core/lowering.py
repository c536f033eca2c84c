"""Exported programs in standard operators alone, for exporters and for processes without iRPE.

`torch.export` keeps the operators of `rpe_ops` and `irpe_core` as single nodes, which nobody else
knows. Lowered, a gather is `aten.gather`, a bucket sum `aten.scatter_add`, and the buckets are
whole-number arithmetic on height and width, which may be symbolic. Every grid has one table, shared
by all layers.
"""

from collections.abc import Callable, Mapping

import torch
from torch.export import ExportedProgram

from irpe_core import buckets
from rpe_ops import reference

__all__ = ["lower"]

_TABLE = torch.ops.irpe_core.bucket_table.default
_DECOMPOSITIONS: dict[Callable, Callable] = {
    _TABLE: buckets.compute_table,
    torch.ops.irpe_core.grid_tables.default: buckets.compute_grid_tables,
    torch.ops.rpe_ops.gather.default: lambda lookup, index, _: reference.gather(lookup, index),
    torch.ops.rpe_ops.bucket_sum.default: lambda pairs, index, num_buckets, _: reference.bucket_sum(
        pairs, index, num_buckets
    ),
}


def lower(
    program: ExportedProgram, decompositions: Mapping[Callable, Callable] | None = None
) -> ExportedProgram:
    """Replace the operators of iRPE in a program by standard ones, for inference.

    Args:
        program: Of a model with encodings, exported after `set_implementation(model, "reference",
            device)`, so that attention is composed of small operators. In it, too, layers with the
            same grid share a table afterwards.
        decompositions: What else to replace, as for `ExportedProgram.run_decompositions`.

    Returns:
        A new program, which computes the same and needs neither `irpe_core` nor `rpe_ops`.

    Raises:
        ValueError: The program holds fused attention, which no exporter can read.
    """
    tables: dict[tuple, torch.fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.target is not _TABLE:
            continue
        # While a program is decomposed every tensor is symbolic: what is computed with real ones
        # has to be at hand.
        buckets.piecewise_steps(node.args[4])
        first = tables.setdefault(node.args, node)
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
