"""Common parts of the flat attention kernels: full tiles of tokens, bucket ids loaded per pair.

The tokens of the grid and the skipped ones form one sequence, in tiles of 16 to 128 *own* and 16 to
64 *other* tokens. The bucket of every pair is read from `rpe_ops.compact_ids`, so no tile has
columns beyond the end of a grid row, and tensor cores have full tiles. The row-tile kernels
(`grid_tiles`) compute the same without the ids.

Names: `p_` pointer, `b_` block, `o_` offsets, `m_` mask. Notation: rpe_ops/README.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpe_ops.compact_ids import compact_ids, ids_size
from rpe_ops.grid import GridBuckets
from rpe_ops.triton_kernels.launch import next_power_of_2

__all__ = [
    "FLAT_SIZES",
    "FlatTiles",
    "choose_flat_tiles",
    "PLANS",
    "FlatKind",
    "flat_kind",
    "common_tensors",
    "pairs_stride",
    "pairs_buffer",
    "heads_per_pass",
    "own_tokens",
    "pair_ids",
    "pair_lookups",
    "bias_and_ids",
    "keep_keys",
]

# Triton must not compile again when these change; see `launch.RUNTIME_SIZES`.
FLAT_SIZES = ["heads", "first_head", "tokens", "blocks", "other_blocks", "num_lookups", "threshold"]

# Number of kinds of attention whose launches are kept ready.
PLANS = 64
# Size of the temporary pairs of one pass. It is smaller than the L2 cache of the GPUs that have
# compute capability 8.0 and 9.0, so that the kernel that reads the pairs finds them there.
_MAX_PAIRS_BYTES = 32 * 2**20
# Heads are the rows of the products in `flat_sums`, and tensor cores need 16 of them. So this many
# heads are in a pass even if their pairs are larger.
_MIN_HEADS = 16


class FlatTiles(NamedTuple):
    """Shape of a program's tiles, and its warps and pipeline stages.

    Attributes:
        own: Own tokens of the program.
        other: Other tokens of a tile.
        warps: Warps of the program.
        stages: Pipeline stages of its loads.
    """

    own: int
    other: int
    warps: int
    stages: int


def choose_flat_tiles(q: Tensor, reads: int, *, backward: bool, wide: bool = False) -> FlatTiles:
    """Choose the tiles by shape only, so that results never depend on a measurement.

    The tiles are the largest ones of those compared that need no spilled registers on sm_80 and
    sm_90.

    Args:
        q: Queries `(B, H, L, d)`.
        reads: Lookups that are read per pair, in all terms.
        backward: Whether the tiles are for the backward.
        wide: Use twice as many own tokens and warps: half as many programs load the other tokens.
    """
    tokens, head_dim = q.shape[2:]
    own, other, warps = 64, 32, 4
    if q.dtype == torch.float32:
        own, other, warps = 32, 16, 8
    elif backward:
        own, other = (64, 16) if head_dim <= 64 else (32, 16)
    elif head_dim > 32 and reads > 3:
        own = 32
    if wide:
        own, warps = 2 * own, 2 * warps
    largest = max(16, next_power_of_2(tokens))
    return FlatTiles(min(own, largest), min(other, largest), warps, 1 if backward else 2)


class FlatKind(NamedTuple):
    """All that the numbers of a launch depend on, except strides and heads per pass.

    Launches are prepared once per kind and kept (`functools.lru_cache`). A kind holds values only,
    no tensors, so equal kinds have the same launches.

    Attributes:
        shape: B, H, L and d.
        tiles: Shape of the tiles.
        terms: Buckets of a pair.
        num_lookups: Values of a lookup per token.
        ids_stride: Length of a row of the bucket ids.
        has_k: Whether lookups of the queries are added to the logits.
        has_q: Whether lookups of the keys are added to the logits.
        has_sums: Whether the bucket sums of the weights are needed, or have a gradient.
        has_padding: Whether some keys are padded.
        scale: Factor on the products.
        dropout_p: Probability of dropping a weight.
    """

    shape: torch.Size
    tiles: FlatTiles
    terms: int
    num_lookups: int
    ids_stride: int
    has_k: bool
    has_q: bool
    has_sums: bool
    has_padding: bool
    scale: float
    dropout_p: float

    def numbers(self) -> dict:
        """Return the arguments of all flat kernels that are no tensors, by name."""
        _, heads, tokens, dim = self.shape
        threshold = int(self.dropout_p * 2**32)
        return {
            "ids_l": self.ids_stride,
            "pairs_l": pairs_stride(tokens),
            "heads": heads,
            "tokens": tokens,
            "blocks": -(-tokens // self.tiles.own),
            "other_blocks": -(-tokens // self.tiles.other),
            "scale": float(self.scale),
            # Triton derives the type of an integer from its value. The bits of the uint32 are
            # passed as an int32, so that the type is always the same.
            "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,
            "keep_scale": 1 / (1 - self.dropout_p),
            "HAS_K": self.has_k,
            "HAS_Q": self.has_q,
            "HAS_SUMS": self.has_sums,
            "HAS_PADDING": self.has_padding,
            "HAS_DROPOUT": self.dropout_p > 0,
            "TERMS": self.terms,
            "DIM": dim,
            "BLOCK_DIM": max(16, next_power_of_2(dim)),
            "BLOCK_OWN": self.tiles.own,
            "BLOCK_OTHER": self.tiles.other,
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
            # Without this limit ptxas spills registers in order to run more programs at a time.
            "maxnreg": 255,
        }

    def passes(self, size: int) -> list[tuple[int, int]]:
        """Return the first head and the number of heads of every pass of at most `size` heads."""
        heads = self.shape[0] * self.shape[1]
        return [(first, min(size, heads - first)) for first in range(0, heads, size)]


def flat_kind(
    q: Tensor,
    buckets: GridBuckets,
    has_k: bool,
    has_q: bool,
    has_sums: bool,
    has_padding: bool,
    scale: float,
    dropout_p: float,
    *,
    backward: bool,
    wide: bool,
) -> FlatKind:
    """Return the kind of attention with queries `q (B, H, L, d)`; see `FlatKind`."""
    terms, num_lookups = buckets.row_base.shape[0], buckets.num_lookups
    # The forward stores the weights and does not read a lookup for their sums.
    reads = terms * (has_k + has_q + (has_sums and backward))
    tiles = choose_flat_tiles(q, reads, backward=backward, wide=wide)
    given = (has_k, has_q, has_sums, has_padding)
    return FlatKind(q.shape, tiles, terms, num_lookups, ids_size(buckets), *given, scale, dropout_p)


def common_tensors(
    q: Tensor, kind: FlatKind, buckets: GridBuckets, key_padding: Tensor | None, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `p_ids`, `p_padding` and `p_seed`; an absent tensor is passed as `q`."""
    has_buckets = kind.has_k or kind.has_q or kind.has_sums
    ids = compact_ids(buckets) if has_buckets else q
    return ids, q if key_padding is None else key_padding.contiguous().view(torch.uint8), seed


def heads_per_pass(q: Tensor, copies: int) -> int:
    """Return for how many heads of the batch the temporary pairs exist at a time.

    Args:
        q: Queries `(B, H, L, d)`.
        copies: Number of temporary tensors of pairs; 0 means that all heads fit.
    """
    heads = q.shape[0] * q.shape[1]
    size = copies * q.shape[2] * pairs_stride(q.shape[2]) * q.element_size()
    passes = max(1, -(-heads * size // _MAX_PAIRS_BYTES))
    return min(heads, max(_MIN_HEADS, -(-heads // passes)))


def pairs_stride(tokens: int) -> int:
    """Return the length of a row of the temporary pairs, a multiple of 16 for wide loads."""
    return -(-tokens // 16) * 16


def pairs_buffer(q: Tensor, heads: int) -> Tensor:
    """Return empty temporary pairs `(heads, L, stride)` in the dtype of `q`."""
    return q.new_empty(heads, q.shape[2], pairs_stride(q.shape[2]))


@triton.jit
def own_tokens(first_head, blocks, tokens, BLOCK: tl.constexpr):
    """Return the head in this pass, the head, and this program's own tokens with their mask."""
    pid = tl.program_id(0)
    o_own = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    return pid // blocks, first_head + pid // blocks, o_own, o_own < tokens


@triton.jit
def pair_ids(p_ids, ids_l, o_from, o_to, TERMS: tl.constexpr):
    """Load the bucket ids of pairs in both terms; `o_from` and `o_to` broadcast, without a mask."""
    p_ids += o_from * ids_l + o_to
    b_ids0 = tl.load(p_ids).to(tl.int32)
    b_ids1 = b_ids0
    if TERMS == 2:
        b_ids1 = tl.load(p_ids + ids_l * ids_l).to(tl.int32)
    return b_ids0, b_ids1


@triton.jit
def pair_lookups(p_lookup, stride_row, o_rows, tokens, b_ids0, b_ids1, TERMS: tl.constexpr):
    """Read the lookups of some rows at the ids of every pair, summed over the terms in float32."""
    # Rows beyond the end read the last one. Their results are masked elsewhere.
    o_rows = tl.minimum(o_rows, tokens - 1) * stride_row
    b_sum = tl.load(p_lookup + (o_rows + b_ids0)).to(tl.float32)
    if TERMS == 2:
        b_sum += tl.load(p_lookup + (o_rows + b_ids1)).to(tl.float32)
    return b_sum


@triton.jit
def bias_and_ids(
    p_ids, ids_l, p_lk, lk_l, p_lq, lq_l, o_q, o_k, tokens, per_scale,
    HAS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_SUMS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Return what is added to the products of queries and keys, and the ids of the pairs.

    `o_q` and `o_k` broadcast. The lookups are divided by the scale.
    """
    b_bias = tl.zeros((o_q + o_k).shape, tl.float32)
    b_ids0, b_ids1 = o_q + o_k, o_q + o_k
    if HAS_K or HAS_SUMS:
        b_ids0, b_ids1 = pair_ids(p_ids, ids_l, o_q, o_k, TERMS)
    if HAS_K:
        b_bias = pair_lookups(p_lk, lk_l, o_q, tokens, b_ids0, b_ids1, TERMS)
    if HAS_Q:
        b_back0, b_back1 = pair_ids(p_ids, ids_l, o_k, o_q, TERMS)
        b_back = pair_lookups(p_lq, lq_l, o_k, tokens, b_back0, b_back1, TERMS)
        # The compiler would keep an addition to zeros.
        b_bias = b_bias + b_back if HAS_K else b_back
    if HAS_K or HAS_Q:
        b_bias *= per_scale
    return b_bias, b_ids0, b_ids1


@triton.jit
def keep_keys(p_padding, o_keys, m_keys, HAS_PADDING: tl.constexpr):
    """Return which keys exist and are not padded."""
    if HAS_PADDING:
        m_keys &= tl.load(p_padding + o_keys, mask=m_keys, other=1) == 0
    return m_keys
