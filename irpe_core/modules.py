"""Self-attention modules with relative position encoding, under the parameter names users know.

`RPEAttention` is the attention of timm's vision transformers (`timm.layers.Attention`) with
`rpe_q`, `rpe_k`, `rpe_v` beside it. It differs in one thing: it has to know the grid of its
tokens, which a transformer block does not pass on; `grid` holds it.
"""

import inspect

import torch
from torch import Tensor, nn

from irpe_core.config import RPEConfig
from irpe_core.encoding import build_rpe
from irpe_core.functional import rpe_attention

__all__ = ["RPEAttention"]


_LAYERS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")


def _check_replaceable(attention: nn.Module) -> None:
    """Raise ValueError unless `RPEAttention` can compute all that `attention` does."""
    needed = {*_LAYERS, "num_heads", "head_dim", "scale"} - {"norm"}
    missing = sorted(name for name in needed if not hasattr(attention, name))
    # A gate, a separate query bias or a second encoding must not be dropped in silence.
    extra = sorted({name.split(".")[0] for name in attention.state_dict()} - set(_LAYERS))
    arguments = list(inspect.signature(attention.forward).parameters)
    foreign = [name for name in arguments if name not in ("x", "attn_mask", "is_causal")]
    for problem, names in (("has no", missing), ("also has", extra), ("also takes", foreign)):
        if names:
            raise ValueError(
                "RPEAttention takes the place of timm.layers.Attention: "
                f"{type(attention).__name__} {problem} {', '.join(names)}"
            )


class RPEAttention(nn.Module):
    """Multi-head self-attention of a vision transformer with relative position encoding.

    Args:
        dim: Channels of the tokens.
        num_heads: Heads; must divide `dim`.
        rpe: The encoding; None for plain attention.
        grid: `(height, width)` of the tokens behind `rpe.skip`; None for a square.
        qkv_bias: Whether the joint projection has a bias.
        attn_drop: Dropout probability of the attention weights.
        proj_drop: Dropout probability of the output.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rpe: RPEConfig | None = None,
        grid: tuple[int, int] | None = None,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.grid = grid
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(rpe, self.head_dim, num_heads)

    @classmethod
    def from_attention(
        cls, attention: nn.Module, rpe: RPEConfig, grid: tuple[int, int] | None = None
    ) -> "RPEAttention":
        """Take over the layers and weights of a `timm.layers.Attention`.

        The encodings start at zero, so the result computes what `attention` did.

        Raises:
            ValueError: `attention` is not of this form or computes more than `RPEAttention` does.
        """
        _check_replaceable(attention)
        # On the meta device: nothing is allocated and no random numbers are drawn.
        with torch.device("meta"):
            self = cls(attention.num_heads * attention.head_dim, attention.num_heads, grid=grid)
        self.scale = attention.scale
        for name in _LAYERS:
            setattr(self, name, getattr(attention, name, nn.Identity()))
        tables = build_rpe(rpe, self.head_dim, self.num_heads)
        weight = attention.qkv.weight
        self.rpe_q, self.rpe_k, self.rpe_v = (
            None if table is None else table.to(weight.device, weight.dtype) for table in tables
        )
        return self.train(attention.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend among the tokens.

        Args:
            x: `(B, L, C)`, skipped tokens first, then the grid row by row.
            attn_mask: As in `rpe_attention`.
            is_causal: Not defined on a grid.

        Returns:
            `(B, L, C)`.

        Raises:
            ValueError: The tokens do not form the grid, or `is_causal`.
        """
        if is_causal:
            raise ValueError("is_causal=True has no meaning on a two-dimensional grid")
        batch, length, _ = x.shape
        # Split before the heads: the backward joins the three gradients in one copy, not in two.
        q, k, v = (
            part.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        height, width = self.grid or (None, None)
        x = rpe_attention(
            self.q_norm(q),
            self.k_norm(k),
            v,
            self.rpe_q,
            self.rpe_k,
            self.rpe_v,
            height=height,
            width=width,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=self.scale,
        )
        x = x.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        return self.proj_drop(self.proj(self.norm(x)))
