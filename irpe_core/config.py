"""The configuration of an encoding, and its short form, the spec.

A spec has the form `rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}`, for example
`rpe-2.0-product-ctx-1-k` (`--enc_rpe2d` of the original DETR-iRPE).
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

__all__ = ["METHODS", "MODES", "RPEConfig", "get_rpe_config", "parse_rpe_spec", "format_rpe_spec"]

METHODS = ("euc", "quant", "cross", "product")
MODES = ("bias", "ctx")
# With this ratio, each distance of up to 100 tokens has a bucket of its own. The number of buckets
# of the product method, and so time and memory, grow with the square of the ratio.
_LARGEST_RATIO = 100

_FORM = "rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}"
_EXAMPLE = "rpe-2.0-product-ctx-1-k"


@dataclass(frozen=True)
class RPEConfig:
    """The validated, hashable configuration of a relative position encoding.

    The piecewise index (paper Eq. 18) has the coefficients `alpha, beta, gamma = 1, 2, 8` times
    `ratio`.

    Args:
        ratio: Larger than 0 and at most 100. A larger ratio gives more and finer buckets.
        method: `euc`, `quant`, `cross` or `product`; see `irpe_core.buckets`.
        mode: `ctx` (contextual: the table is multiplied by queries, keys or attention weights) or
            `bias` (one number per bucket).
        shared_head: Use one table for all heads instead of one per head.
        skip: Number of tokens before the grid, such as a class token. All pairs with one of them
            share one extra bucket.
        rpe_on: One or more of the letters `q`, `k`, `v`; stored in that order.

    Raises:
        ValueError: A field has a value that is not allowed.
    """

    ratio: float = 1.9
    method: str = "product"
    mode: str = "ctx"
    shared_head: bool = True
    skip: int = 0
    rpe_on: str = "k"

    def __post_init__(self) -> None:
        is_number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not is_number or not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio must be a finite number > 0, got {self.ratio!r}")
        if self.ratio > _LARGEST_RATIO:
            raise ValueError(f"ratio must be at most {_LARGEST_RATIO}, got {self.ratio!r:.40}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.shared_head not in (0, 1):
            raise ValueError(f"shared_head must be 0 or 1, got {self.shared_head!r}")
        if isinstance(self.skip, bool) or not isinstance(self.skip, int) or self.skip < 0:
            raise ValueError(f"skip must be a whole number >= 0, got {self.skip!r}")
        _check_rpe_on(self.rpe_on, self.mode)
        object.__setattr__(self, "shared_head", bool(self.shared_head))
        object.__setattr__(self, "rpe_on", "".join(c for c in "qkv" if c in self.rpe_on))

    @property
    def side(self) -> int:
        """Number of buckets along one axis, `2·int(beta) + 1`."""
        return 2 * int(2 * self.ratio) + 1

    @property
    def num_buckets(self) -> int:
        """Number of buckets of one table, with the extra bucket of skipped tokens."""
        grid_buckets = self.side**2 if self.method == "product" else self.side
        return grid_buckets + (1 if self.skip else 0)


def _check_rpe_on(rpe_on: str, mode: str) -> None:
    """Raise ValueError unless `rpe_on` has different letters that the mode allows."""
    if (
        not isinstance(rpe_on, str)
        or not rpe_on
        or set(rpe_on) - set("qkv")
        or len(set(rpe_on)) != len(rpe_on)
    ):
        raise ValueError(
            f"rpe_on must be one or more of the letters q, k, v, each once, got {rpe_on!r}"
        )
    if mode == "bias" and "v" in rpe_on:
        raise ValueError(
            f"rpe_on must not contain v with mode='bias', got {rpe_on!r}: values have no bias "
            "encoding, use mode='ctx' or leave out v"
        )


def get_rpe_config(
    ratio: float = 1.9,
    method: str = "product",
    mode: str = "ctx",
    shared_head: bool = True,
    skip: int = 0,
    rpe_on: str = "k",
) -> RPEConfig:
    """Make an `RPEConfig`, with the argument names of the original iRPE.

    `mode="contextual"`, the long form of the original, is the same as `"ctx"`.

    Raises:
        ValueError: An argument has a value that is not allowed; see `RPEConfig`.
    """
    mode = "ctx" if mode == "contextual" else mode
    return RPEConfig(ratio, method, mode, shared_head, skip, rpe_on)


def parse_rpe_spec(spec: str, *, skip: int = 0) -> RPEConfig | None:
    """Parse a spec, `rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}`.

    Args:
        spec: The spec, for example `rpe-1.9-product-ctx-1-qkv`.
        skip: Number of tokens before the grid, which is not part of a spec.

    Returns:
        The configuration; None for an empty spec.

    Raises:
        ValueError: The spec is malformed, or one of its values is not allowed.
    """
    if not spec:
        return None
    parts = spec.split("-")
    if parts[0] != "rpe" or len(parts) != 6:
        plural = "s" if len(parts) > 1 else ""
        reason = (
            f"has {len(parts)} part{plural} instead of 6"
            if parts[0] == "rpe"
            else "does not begin with 'rpe'"
        )
        raise ValueError(
            f"rpe spec must have the form {_FORM}, for example {_EXAMPLE}, got {spec!r}, which "
            f"{reason}"
        )
    _, ratio, method, mode, shared_head, rpe_on = parts
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", ratio):
        raise ValueError(f"rpe spec {spec!r}: ratio must be a decimal number > 0, got {ratio!r}")
    if shared_head not in ("0", "1"):
        raise ValueError(f"rpe spec {spec!r}: shared_head must be 0 or 1, got {shared_head!r}")
    try:
        return RPEConfig(float(ratio), method, mode, shared_head == "1", skip, rpe_on)
    except ValueError as error:
        raise ValueError(f"rpe spec {spec!r}: {error}") from None


def format_rpe_spec(config: RPEConfig | None) -> str:
    """Write a configuration, without `skip`, as a spec; the inverse of `parse_rpe_spec`."""
    if config is None:
        return ""
    # Scientific notation, such as "1e-05", would add a hyphen to the spec.
    ratio = format(Decimal(str(float(config.ratio))), "f")
    return f"rpe-{ratio}-{config.method}-{config.mode}-{int(config.shared_head)}-{config.rpe_on}"
