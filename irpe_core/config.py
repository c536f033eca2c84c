"""What an encoding is: ratio, method, mode, sharing, skipped tokens, and what it is added to.

A configuration is written as `rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}`, for example
`rpe-2.0-product-ctx-1-k` (the `--enc_rpe2d` of the original DETR-iRPE).
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

__all__ = ["METHODS", "MODES", "RPEConfig", "get_rpe_config", "parse_rpe_spec", "format_rpe_spec"]

METHODS = ("euc", "quant", "cross", "product")
MODES = ("bias", "ctx")

_FORM = "rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}"
_EXAMPLE = "rpe-2.0-product-ctx-1-k"


@dataclass(frozen=True)
class RPEConfig:
    """A validated, hashable description of one relative position encoding.

    The piecewise index (paper Eq. 18) has the coefficients `alpha, beta, gamma = 1, 2, 8` times
    `ratio`.

    Args:
        ratio: Finite and positive; larger means more and finer buckets.
        method: `euc`, `quant`, `cross` or `product`; see `irpe_core.buckets`.
        mode: `ctx` (contextual, depends on the query, key or value) or `bias`.
        shared_head: One table for all heads instead of one for each.
        skip: Number of tokens before the grid, such as a class token. Every pair with one of
            them falls into one extra bucket.
        rpe_on: Letters of `q`, `k`, `v`; kept in that order.

    Raises:
        ValueError: Names the field, its value and what is allowed.
    """

    ratio: float = 1.9
    method: str = "product"
    mode: str = "ctx"
    shared_head: bool = True
    skip: int = 0
    rpe_on: str = "k"

    def __post_init__(self) -> None:
        is_number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not is_number or not math.isfinite(self.ratio) or self.ratio <= 0:
            raise ValueError(f"ratio must be a finite number > 0, got {self.ratio!r}")
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
        """Buckets of one table, the extra one of skipped tokens included."""
        grid_buckets = self.side**2 if self.method == "product" else self.side
        return grid_buckets + (1 if self.skip else 0)


def _check_rpe_on(rpe_on: str, mode: str) -> None:
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
            f"rpe_on={rpe_on!r} with mode='bias': values have no bias encoding, "
            "use mode 'ctx' or leave out v"
        )


def get_rpe_config(
    ratio: float = 1.9,
    method: str = "product",
    mode: str = "ctx",
    shared_head: bool = True,
    skip: int = 0,
    rpe_on: str = "k",
) -> RPEConfig:
    """Describe an encoding, with the argument names of the original.

    `mode="contextual"` is accepted as the original's long form of `"ctx"`.

    Raises:
        ValueError: As `RPEConfig`.
    """
    mode = "ctx" if mode == "contextual" else mode
    return RPEConfig(ratio, method, mode, shared_head, skip, rpe_on)


def parse_rpe_spec(spec: str, *, skip: int = 0) -> RPEConfig | None:
    """Read `rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}`; an empty spec means no encoding.

    Args:
        spec: For example `rpe-1.9-product-ctx-1-qkv`.
        skip: Tokens before the grid, which a spec does not hold.

    Raises:
        ValueError: Names the part, its value and what is allowed.
    """
    if not spec:
        return None
    parts = spec.split("-")
    if parts[0] != "rpe" or len(parts) != 6:
        raise ValueError(
            f"rpe spec {spec!r} has {len(parts)} part{'s' * (len(parts) != 1)} and begins with "
            f"{parts[0]!r}: it must have the form {_FORM}, for example {_EXAMPLE}"
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
    """Write a configuration as a spec, the inverse of `parse_rpe_spec` (without `skip`)."""
    if config is None:
        return ""
    # Never in scientific notation, whose "1e-05" would not survive the split at the hyphens.
    ratio = format(Decimal(str(float(config.ratio))), "f")
    return f"rpe-{ratio}-{config.method}-{config.mode}-{int(config.shared_head)}-{config.rpe_on}"
