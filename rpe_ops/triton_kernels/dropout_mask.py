"""The mask of dropout inside a kernel; its equations are in `rpe_ops.dropout`."""

import triton
import triton.language as tl

__all__ = ["query_keys", "survives"]


@triton.jit
def query_keys(p_seed, head, o_queries):
    """Return the two random words of every query."""
    o_queries = o_queries.to(tl.uint32)
    zero = o_queries * 0
    key0, key1, _, _ = tl.philox(tl.load(p_seed), o_queries, zero + head.to(tl.uint32), zero, zero)
    return key0, key1


@triton.jit
def survives(b_key0, b_key1, o_keys, threshold):
    """Return which pairs survive; words of queries and indices of keys broadcast."""
    x = o_keys.to(tl.uint32) * 0x9E3779B9 + b_key0
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = x ^ b_key1
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = x ^ (x >> 16)
    return x >= threshold.to(tl.uint32, bitcast=True)
