"""Small bucket ids `(terms, S, S)` of one grid, kept in a bounded cache.

The axis offsets (`rpe_ops.grid`) are enough for every grid. A kernel that loads the id of every
pair needs fewer instructions, but the ids need memory for `L × L` pairs. So they exist for small
grids only. All batches, heads and layers share one tensor. Notation: rpe_ops/README.md.
"""

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from rpe_ops.grid import GridBuckets

__all__ = ["MAX_BYTES", "PADDING", "compact_ids", "ids_dtype", "ids_size", "is_small"]

# Largest tensor of ids. 197 tokens need 64 KB and 1050 tokens 1.3 MB; 4200 tokens would need 17 MB.
MAX_BYTES = 4 * 2**20
# The ids are padded to a multiple of this number of tokens, so that no tile needs a mask.
PADDING = 128
_MAX_ENTRIES = 32

_lock = threading.Lock()
_cache: OrderedDict[tuple, tuple[GridBuckets, Tensor]] = OrderedDict()


def ids_dtype(buckets: GridBuckets) -> torch.dtype:
    """Return the smallest integer type that can hold all ids."""
    if buckets.num_lookups <= 2**8:
        return torch.uint8
    return torch.int16 if buckets.num_lookups <= 2**15 else torch.int32


def ids_size(buckets: GridBuckets) -> int:
    """Return the number of tokens, rounded up to a multiple of `PADDING`."""
    return -(-buckets.num_tokens // PADDING) * PADDING


def is_small(buckets: GridBuckets) -> bool:
    """Return whether the ids of the grid need at most `MAX_BYTES`."""
    terms = buckets.row_base.shape[0]
    return terms * ids_size(buckets) ** 2 * ids_dtype(buckets).itemsize <= MAX_BYTES


def compact_ids(buckets: GridBuckets) -> Tensor:
    """Return the ids `(terms, S, S)` with `S = ids_size(buckets)`; padded pairs have id 0.

    The caller must not write to them. The cache holds the axis offsets of its entries, so that
    another tensor never has the same identity. It has at most 32 entries, each of at most
    `MAX_BYTES` if `is_small(buckets)`.
    """
    stream = None
    if buckets.row_base.is_cuda:
        # Work of another stream is not ordered with this one, and memory that is allocated while a
        # CUDA graph is captured belongs to the graph.
        stream = torch.cuda.current_stream(buckets.row_base.device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            return _compute(buckets)
    key = (id(buckets.row_base), id(buckets.local), *buckets[2:], stream)
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key][1]
    ids = _compute(buckets)
    with _lock:
        _cache[key] = buckets, ids
        while len(_cache) > _MAX_ENTRIES:
            _cache.popitem(last=False)
    return ids


def _compute(buckets: GridBuckets) -> Tensor:
    """Compute the ids from the axis offsets."""
    missing = ids_size(buckets) - buckets.num_tokens
    ids = buckets.bucket_ids().to(ids_dtype(buckets))
    return torch.nn.functional.pad(ids, (0, missing, 0, missing))
