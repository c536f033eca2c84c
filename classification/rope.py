"""Two-dimensional rotary position embedding (RoPE) in the attention of timm's vision transformers.

    logits[i, j] = (R(i) q_i) · (R(j) k_j) / √d

R(i) rotates pairs of channels. The first half of the pairs turns with the row of token i, the other
half with its column, each pair with a frequency of its own, so that the logits depend only on
relative positions. The angles and the rotation are those of timm (`RotaryEmbeddingCat` and
`apply_rot_embed_cat`) with the frequencies of RoPE-ViT's axial variant. Tokens before the grid are
not rotated.

Source: RoPE (Su et al., 2021) and RoPE-ViT (Heo et al., ECCV 2024).
"""

import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

__all__ = ["ROPE", "RotaryAttention", "add_rope"]

ROPE = "rope"
"""Value of the option `rpe` that selects the rotary embedding."""

_TEMPERATURE = 100.0  # of RoPE-ViT's axial variant


def add_rope(model: nn.Module) -> nn.Module:
    """Replace the attention of every block by one with rotary embedding, in place.

    Layers, weights and names of parameters stay the same. The angles are not parameters and not in
    the state dict: they are computed from the grid of the model.

    Args:
        model: A vision transformer of timm.

    Returns:
        The same model.

    Raises:
        ValueError: The blocks do not have timm's `Attention`, or the channels of a head are not
            divisible by 4. The model is then unchanged.
    """
    blocks = list(getattr(model, "blocks", ()))
    if not blocks or any(type(getattr(block, "attn", None)) is not Attention for block in blocks):
        raise ValueError(
            f"rpe {ROPE!r} is for models whose blocks have timm's Attention, "
            f"got {type(model).__name__}"
        )
    head_dim = blocks[0].attn.head_dim
    if head_dim % 4:
        raise ValueError(
            f"embed_dim / num_heads must be divisible by 4 for rpe {ROPE!r}, got {head_dim}"
        )
    angles = RotaryEmbeddingCat(
        head_dim,
        temperature=_TEMPERATURE,
        in_pixels=False,
        feat_shape=list(model.patch_embed.grid_size),
    )
    for block in blocks:
        block.attn = RotaryAttention(block.attn, angles, model.num_prefix_tokens)
    return model


class RotaryAttention(nn.Module):
    """timm's `Attention` with queries and keys that are rotated by their positions.

    Args:
        attention: The attention whose layers are used.
        angles: Sines and cosines of the angles for the grid; all blocks share it.
        num_prefix_tokens: Number of tokens before the grid, which are not rotated.
    """

    def __init__(
        self, attention: Attention, angles: RotaryEmbeddingCat, num_prefix_tokens: int
    ) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.num_prefix_tokens = num_prefix_tokens
        # A subclass of Attention would draw new weights first. Older releases of timm have neither
        # `norm` nor `gate`.
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"):
            setattr(self, name, getattr(attention, name))
        self.norm = getattr(attention, "norm", nn.Identity())
        self.gate = getattr(attention, "gate", None)
        self.angles = angles

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate queries or keys `(B, H, L, d)` by the positions of their tokens."""
        prefix, grid = x.split([self.num_prefix_tokens, x.shape[2] - self.num_prefix_tokens], dim=2)
        rotated = apply_rot_embed_cat(grid, self.angles.get_embed())
        return torch.cat([prefix, rotated.type_as(x)], dim=2)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend among the tokens `(B, L, C)`; the other arguments are those of timm's class."""
        gate = None if self.gate is None else self.gate(x).sigmoid()
        shape = x.shape[0], x.shape[1], 3, self.num_heads, self.head_dim
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(
            self.rotate(self.q_norm(q)),
            self.rotate(self.k_norm(k)),
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out if gate is None else out * gate))
