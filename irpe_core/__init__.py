"""Image relative position encoding (iRPE, ICCV 2021) for any attention.

Build an encoding with `get_rpe_config` and `build_rpe`, and attend with `rpe_attention`,
`RPEAttention` or `RPEMultiheadAttention`. `add_irpe` adds an encoding to an existing model.
"""

from irpe_core.add import add_irpe, set_grid
from irpe_core.autotune import AUTOTUNER
from irpe_core.buckets import BucketCache, bucket_ids, piecewise_index
from irpe_core.checkpoint import load_checkpoint, load_weights
from irpe_core.config import (
    METHODS,
    MODES,
    RPEConfig,
    format_rpe_spec,
    get_rpe_config,
    parse_rpe_spec,
)
from irpe_core.encoding import BiasRPE, ContextualRPE, CrossRPE, ValueRPE, build_rpe
from irpe_core.errors import CheckpointError
from irpe_core.functional import rpe_attention, set_implementation
from irpe_core.modules import RPEAttention
from irpe_core.multihead import RPEMultiheadAttention
from rpe_ops import ImplementationError

__all__ = [
    "METHODS",
    "MODES",
    "RPEConfig",
    "get_rpe_config",
    "parse_rpe_spec",
    "format_rpe_spec",
    "piecewise_index",
    "bucket_ids",
    "BucketCache",
    "ContextualRPE",
    "BiasRPE",
    "ValueRPE",
    "CrossRPE",
    "build_rpe",
    "rpe_attention",
    "RPEAttention",
    "RPEMultiheadAttention",
    "add_irpe",
    "set_grid",
    "set_implementation",
    "AUTOTUNER",
    "ImplementationError",
    "CheckpointError",
    "load_checkpoint",
    "load_weights",
]
