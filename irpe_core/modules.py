"""Self-attention modules with relative position encoding and the parameter names of timm.

`RPEAttention` is the attention of timm's vision transformers (`timm.layers.Attention`) with the
encodings `rpe_q`, `rpe_k` and `rpe_v`. It needs the grid of its tokens, which a transformer block
does not pass to its attention, so it is an attribute, `grid`. The attention of EVA
(`timm.models.eva.EvaAttention`) has different projections, and keeps them when it is replaced.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_core.config import RPEConfig
from irpe_core.encoding import build_rpe
from irpe_core.functional import rpe_attention
from irpe_core.replaceable import TIMM_ATTENTIONS, check_replaceable, class_path

__all__ = ["RPEAttention"]


@torch.fx.wrap  # torch.fx records one node, and does not trace the checks inside
def _attend(
    q: Tensor, k: Tensor, v: Tensor, *encodings: nn.Module | None, is_causal: bool, **options
) -> Tensor:
    """Call `rpe_attention`; raise ValueError if `is_causal` is True."""
    if is_causal:
        raise ValueError("is_causal must be False on a two-dimensional grid, got True")
    return rpe_attention(q, k, v, *encodings, **options)


_LAYERS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
_EVA_LAYERS = ("q_proj", "k_proj", "v_proj", "q_bias", "v_bias")


class RPEAttention(nn.Module):
    """Multi-head self-attention of a vision transformer with relative position encoding.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads; must divide `dim`.
        rpe: The encoding; None for plain attention.
        grid: Height and width in tokens, without the skipped tokens; None for a square.
        qkv_bias: Add a bias to the joint projection of queries, keys and values.
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
        self.gate: nn.Module | None = None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(rpe, self.head_dim, num_heads)

    @classmethod
    def from_attention(
        cls, attention: nn.Module, rpe: RPEConfig, grid: tuple[int, int] | None = None
    ) -> "RPEAttention":
        """Make a replacement of an attention of timm, with its layers and weights.

        The encodings start at zero, so the replacement computes the same as `attention`.

        Args:
            attention: A `timm.layers.Attention` or `timm.models.eva.EvaAttention`.
            rpe: The encoding.
            grid: Height and width in tokens, without the skipped tokens; None for a square.

        Raises:
            ValueError: `attention` is of another class, also a subclass, or computes something that
                `RPEAttention` does not compute.
        """
        check_replaceable(attention, TIMM_ATTENTIONS)
        is_eva = class_path(attention).endswith("EvaAttention")
        # The meta device allocates no memory and draws no random numbers.
        with torch.device("meta"):
            self = (_RPEEvaAttention if is_eva else cls)(
                attention.proj.in_features, attention.num_heads, grid=grid
            )
        # This comes before the layers, so that each of them keeps its own mode.
        self.train(attention.training)
        if not getattr(attention, "fused_attn", False):
            # With `fused_attn`, timm ignores `scale` and uses the default of torch's attention.
            self.scale = attention.scale
        for name in _LAYERS + (_EVA_LAYERS if is_eva else ()):
            # Older releases of timm do not have all of them.
            setattr(self, name, getattr(attention, name, getattr(self, name)))
        weight = self.proj.weight
        self.rpe_q, self.rpe_k, self.rpe_v = (
            table and table.to(weight.device, weight.dtype).train(attention.training)
            for table in build_rpe(rpe, self.head_dim, self.num_heads)
        )
        return self

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend among the tokens.

        Args:
            x: Tokens `(B, L, dim)`: first the skipped tokens, then the grid row by row.
            attn_mask: Mask as in `rpe_attention`.
            is_causal: Must be False. It exists because timm passes it.

        Returns:
            The output `(B, L, dim)`.

        Raises:
            ValueError: The tokens do not form the grid, or `is_causal` is True.
        """
        gate = None if self.gate is None else self.gate(x).sigmoid()
        q, k, v = self._project(x)
        height, width = self.grid or (None, None)
        out = _attend(
            self.q_norm(q),
            self.k_norm(k),
            v,
            self.rpe_q,
            self.rpe_k,
            self.rpe_v,
            is_causal=is_causal,
            height=height,
            width=width,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=self.scale,
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out if gate is None else out * gate))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values `(B, H, L, d)`."""
        return self._cut(self.qkv(x))

    def _cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Split joint projections `(B, L, 3·H·d)` into queries, keys and values `(B, H, L, d)`."""
        # Splitting in this memory order saves a copy of the gradients in the backward pass. With
        # unflatten, torch.onnx.export(dynamo=False) would make the batch size a constant.
        shape = qkv.shape[0], qkv.shape[1], 3, self.num_heads, self.head_dim
        q, k, v = qkv.reshape(shape).unbind(2)  # torch.fx can trace this, but no loop over parts
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _RPEEvaAttention(RPEAttention):
    """`RPEAttention` with the projections of EVA: one without a bias on keys, or three."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name in _EVA_LAYERS:
            setattr(self, name, None)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend as `RPEAttention`; `rope` must be None. It exists because EVA passes it."""
        if rope is not None:
            raise ValueError(
                f"rope must be None, got a {type(rope).__name__}: iRPE cannot be combined with "
                "rotary position embeddings"
            )
        return super().forward(x, attn_mask, is_causal)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values `(B, H, L, d)` by the projections that EVA has."""
        if self.qkv is None:
            parts = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
            return self._cut(torch.cat(parts, -1))
        if self.q_bias is None:
            return self._cut(self.qkv(x))
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return self._cut(F.linear(x, self.qkv.weight, bias))
