"""Common parts of the attention kernels: loops over the grid, buckets of a tile, sums by bucket.

A tile holds the pairs of tokens of one grid row, the *own* tokens, with tokens of another grid row,
the *other* tokens. Row -1 holds the skipped tokens. The difference of rows is the same in the whole
tile, so

    bucket_t(own, other) = base_t + local_t[own column, other column]

with a scalar base, from the axis offsets (`rpe_ops.grid`). Consecutive other rows with the same
base form a *run*. All tiles of a run have the same buckets: a lookup is read once per run, and
pairs are summed over the run before they are split by bucket. If the buckets are not separable, a
run is a single row and the base is 0.

Names: `p_` pointer, `b_` block, `o_` offsets, `m_` mask. The second term (`TERMS == 2`, the cross
method) has variables of its own; with one term they repeat those of the first.
Notation: rpe_ops/README.md.
"""

import triton
import triton.language as tl

from rpe_ops.triton_kernels.dropout_mask import query_keys

__all__ = [
    "LOG2E",
    "LN2",
    "row_tokens",
    "own_columns",
    "run_end",
    "base_buckets",
    "local_buckets",
    "gather_terms",
    "enter_run",
    "tile_logits",
    "add_by_local",
    "finish_run",
    "load_queries",
    "load_rows",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def own_columns(tiles, chunks, HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr):
    """Return the head, the grid row and the columns of this program's own tokens."""
    pid = tl.program_id(0)
    tile = pid % tiles
    o_columns = tile % chunks * BLOCK + tl.arange(0, BLOCK)
    return pid // tiles, tile // chunks - HAS_SKIP, o_columns


@triton.jit
def row_tokens(row, o_columns, width, skip):
    """Return the tokens' indices in some columns of a row, and which columns exist."""
    m_tokens = o_columns < tl.where(row < 0, skip, width)
    return o_columns + tl.where(row < 0, 0, skip + row * width), m_tokens


@triton.jit
def load_rows(p_x, stride_row, o_rows, m_rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Load rows of a matrix `(L, DIM)`, zero where masked and beyond DIM."""
    o_dim = tl.arange(0, BLOCK_DIM)
    p_x += o_rows[:, None] * stride_row + o_dim[None, :]
    return tl.load(p_x, mask=m_rows[:, None] & (o_dim < DIM)[None, :], other=0.0)


@triton.jit
def load_queries(p_lse, p_delta, p_seed, head, o_q, m_q, HAS_DROPOUT: tl.constexpr):
    """Load lse in base 2 and delta of every query, and compute its random words of dropout."""
    b_lse = LOG2E * tl.load(p_lse + o_q, mask=m_q, other=0.0)
    # An lse of inf gives weights of 0. It is set for queries without any key and outside the grid.
    b_lse = tl.where(m_q & (b_lse != float("-inf")), b_lse, float("inf"))
    b_delta = tl.load(p_delta + o_q, mask=m_q, other=0.0)
    b_key0, b_key1 = o_q, o_q
    if HAS_DROPOUT:
        b_key0, b_key1 = query_keys(p_seed, head, o_q)
    return b_lse, b_delta, b_key0, b_key1


@triton.jit
def run_end(
    p_row_base,
    own_row,
    row,
    height,
    TERMS: tl.constexpr,
    SEPARABLE: tl.constexpr,
    HAS_BUCKETS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Return the end, exclusive, of the run of other rows that begins at `row`."""
    if not HAS_BUCKETS:
        end = height
    elif not SEPARABLE:
        end = row + 1
    else:
        # Bases are sorted along the rows, so equal ones are adjacent and counting them is enough.
        on_grid = (own_row >= 0) & (row >= 0)
        o_rows = tl.arange(0, BLOCK_ROWS)
        m_same = (o_rows >= row) & (o_rows < tl.where(on_grid, height, row))
        p_row_base += own_row + height - 1
        for _ in tl.static_range(TERMS):
            base = tl.load(p_row_base - row, mask=on_grid, other=0)
            m_same &= tl.load(p_row_base - o_rows, mask=m_same, other=-1) == base
            p_row_base += 2 * height - 1
        end = row + tl.sum(m_same.to(tl.int32), 0)
        end = tl.where(row < 0, 0, end)
        # Skipped own tokens have the same bucket with all other tokens.
        end = tl.where(own_row < 0, height, end)
    return end


@triton.jit
def base_buckets(p_row_base, row, other_row, height, num_buckets, TERMS: tl.constexpr):
    """Return the bases of a pair of rows in both terms, without `t·K`; -1 past the grid."""
    on_grid = (row >= 0) & (other_row >= 0) & (other_row < height)
    p_row_base += row - other_row + height - 1
    base0 = tl.load(p_row_base, mask=on_grid, other=num_buckets - 1)
    base0 = tl.where(other_row < height, base0, -1)
    base1 = base0
    if TERMS == 2:
        base1 = tl.load(p_row_base + 2 * height - 1, mask=on_grid, other=num_buckets - 1)
        base1 = tl.where(other_row < height, base1, -1)
    return base0, base1


@triton.jit
def local_buckets(
    p_local,
    row,
    other_row,
    o_from,
    o_to,
    height,
    width,
    TERMS: tl.constexpr,
    SEPARABLE: tl.constexpr,
):
    """Return the local buckets of columns `o_from` and `o_to`, which broadcast; 0 if skipped."""
    on_grid = (row >= 0) & (other_row >= 0)
    # Columns beyond the grid are clamped to an existing bucket. This keeps the range of local
    # buckets in a tile narrow, which `add_by_local` loops over.
    offset = tl.minimum(tl.maximum(o_from - o_to + width - 1, 0), 2 * width - 2)
    term_size = 2 * width - 1
    if not SEPARABLE:
        p_local += (row - other_row + height - 1) * (2 * width - 1)
        term_size *= 2 * height - 1
    m_local = offset < tl.where(on_grid, 2 * width, 0)
    b_local0 = tl.load(p_local + offset, mask=m_local, other=0)
    b_local1 = b_local0
    if TERMS == 2:
        b_local1 = tl.load(p_local + term_size + offset, mask=m_local, other=0)
    return b_local0, b_local1


@triton.jit
def gather_terms(
    p_lookup,
    stride_row,
    o_rows,
    m_rows,
    base0,
    base1,
    b_local0,
    b_local1,
    num_buckets,
    TERMS: tl.constexpr,
):
    """Read the lookups of some rows at the tile's buckets, summed over the terms in float32.

    `o_rows` and `m_rows` broadcast with the tile: own tokens `[:, None]`, other tokens `[None, :]`.
    """
    o_rows *= stride_row
    b_sum = tl.load(p_lookup + (o_rows + base0 + b_local0), mask=m_rows, other=0.0).to(tl.float32)
    if TERMS == 2:
        o_rows += num_buckets
        b_second = tl.load(p_lookup + (o_rows + base1 + b_local1), mask=m_rows, other=0.0)
        b_sum += b_second.to(tl.float32)
    return b_sum


@triton.jit
def enter_run(
    p_row_base, p_local, p_lookup, stride_row, row, first, o_own, m_own, o_columns, o_others,
    height, width, num_buckets, scale,
    HAS_OWN: tl.constexpr, HAS_OTHER: tl.constexpr, TERMS: tl.constexpr, SEPARABLE: tl.constexpr,
):  # fmt: skip
    """Return what is constant in a run, for one block of other columns.

    These are the local buckets from own to other tokens, those from other to own tokens, and the
    own lookups divided by the scale.
    """
    b_local0, b_local1 = local_buckets(
        p_local, row, first, o_columns[:, None], o_others[None, :], height, width, TERMS, SEPARABLE
    )
    b_back0, b_back1 = b_local0, b_local1
    if HAS_OTHER:
        b_back0, b_back1 = local_buckets(
            p_local, first, row, o_others[None, :], o_columns[:, None], height, width, TERMS,
            SEPARABLE,
        )  # fmt: skip
    b_bias = tl.zeros(b_local0.shape, tl.float32)
    if HAS_OWN:
        base0, base1 = base_buckets(p_row_base, row, first, height, num_buckets, TERMS)
        b_bias = gather_terms(
            p_lookup, stride_row, o_own[:, None], m_own[:, None], base0, base1, b_local0, b_local1,
            num_buckets, TERMS,
        ) / scale  # fmt: skip
    return b_local0, b_local1, b_back0, b_back1, b_bias


@triton.jit
def tile_logits(
    b_own, b_other, b_bias, scale, p_row_base, p_lookup, stride_row, row, other_row, o_other,
    m_other, b_back0, b_back1, height, num_buckets,
    HAS_OTHER: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """Return logits in base 2: the scaled product plus the lookups of own and other tokens."""
    # Lookups are the accumulator of the product. If they were added after it, their register layout
    # would be used for the reductions that follow, which would then need shared memory.
    b_logits = b_bias
    if HAS_OTHER:
        back0, back1 = base_buckets(p_row_base, other_row, row, height, num_buckets, TERMS)
        b_logits += gather_terms(
            p_lookup, stride_row, o_other[None, :], m_other[None, :], back0, back1, b_back0,
            b_back1, num_buckets, TERMS,
        ) / scale  # fmt: skip
    b_logits = tl.dot(b_own, tl.trans(b_other), b_logits, input_precision="ieee")
    return b_logits * (scale * LOG2E)


@triton.jit
def add_by_local(b_sums, b_pairs, b_local):
    """Add pairs to sums: `b_sums[i, c] += Σ_j [b_local[i, j] = c] · b_pairs[i, j]`."""
    o_local = tl.arange(0, b_sums.shape[1])[None, :]
    for local in range(tl.min(b_local), tl.max(b_local) + 1):
        b_total = tl.sum(tl.where(b_local == local, b_pairs, 0.0), 1)
        b_sums += tl.where(o_local == local, b_total[:, None], 0.0)
    return b_sums


@triton.jit
def finish_run(
    p_sums, b_sums0, b_sums1, m_rows, p_row_base, row, first, end, height, num_buckets, run_width,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Store the sums if the next run has another base; return the sums to continue with."""
    base0, base1 = base_buckets(p_row_base, row, first, height, num_buckets, TERMS)
    next0, next1 = base_buckets(p_row_base, row, end, height, num_buckets, TERMS)
    # With two terms, the first depends on the rows only, so it has a single local bucket.
    width0 = 1 if TERMS == 2 else run_width
    if next0 != base0:
        _store_sums(p_sums, b_sums0, m_rows, base0, num_buckets, width0)
    b_sums0 = tl.where(next0 == base0, b_sums0, 0.0)
    if TERMS == 2:
        if next1 != base1:
            p_sums += num_buckets
            _store_sums(p_sums, b_sums1, m_rows, base1, num_buckets, run_width)
        b_sums1 = tl.where(next1 == base1, b_sums1, 0.0)
    return b_sums0, b_sums1


@triton.jit
def _store_sums(p_sums, b_sums, m_rows, base, num_buckets, run_width):
    """Store the sums of all local buckets at `base`."""
    o_local = tl.arange(0, b_sums.shape[1])
    # The base of skipped tokens is the last bucket, so other local buckets are out of range.
    m_local = (o_local < run_width) & (base + o_local < num_buckets)
    p_sums = p_sums[:, None] + (base + o_local)[None, :]
    tl.store(p_sums, b_sums, mask=m_rows[:, None] & m_local[None, :])
