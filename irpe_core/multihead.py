"""`nn.MultiheadAttention` with relative position encoding and the same parameter names.

    q, k, v = projections of query, key and value, split into heads
    out     = out_proj(rpe_attention(q, k, v))

Source: iRPE (Wu et al., ICCV 2021), which has it in the encoder of DETR. Without an encoding the
outputs are bit-identical to those of torch's module. With one there are two differences: the module
needs the grid of the tokens (`hw=` or `grid`), and the attention of a query that may attend nowhere
is zero instead of NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irpe_core.composed import add_mask, attention_weights, logit_bias
from irpe_core.config import RPEConfig
from irpe_core.encoding import build_rpe
from irpe_core.functional import rpe_attention
from irpe_core.replaceable import TORCH_ATTENTIONS, check_replaceable

__all__ = ["RPEMultiheadAttention"]


class RPEMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention with relative position encoding on queries, keys or values.

    Args:
        embed_dim: Channels of the tokens.
        num_heads: Number of heads; must divide `embed_dim`.
        dropout: Probability of dropping an attention weight in training.
        bias: Add biases to the projections.
        batch_first: Tokens are `(B, L, embed_dim)` instead of `(L, B, embed_dim)`.
        rpe: The encoding; None for plain attention.
        grid: Height and width in tokens, without the skipped tokens, for calls without `hw`; None
            for a square.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: `num_heads` does not divide `embed_dim`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        rpe: RPEConfig | None = None,
        *,
        grid: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim={embed_dim}, got {num_heads}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.grid = grid
        self._set_encodings(rpe, device, dtype)

    def _set_encodings(
        self,
        rpe: RPEConfig | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Build `rpe_q`, `rpe_k` and `rpe_v`."""
        self.rpe_q, self.rpe_k, self.rpe_v = (
            encoding and encoding.to(device=device, dtype=dtype)
            for encoding in build_rpe(rpe, self.head_dim, self.num_heads)
        )
        if rpe is not None:
            # Otherwise nn.TransformerEncoderLayer passes the weights, in evaluation, to a fused
            # kernel that has no encodings.
            self._qkv_same_embed_dim = False

    @classmethod
    def from_attention(
        cls,
        attention: nn.MultiheadAttention,
        rpe: RPEConfig,
        grid: tuple[int, int] | None = None,
    ) -> "RPEMultiheadAttention":
        """Make a replacement of an `nn.MultiheadAttention`, with its weights.

        The encodings start at zero, so the replacement computes the same as `attention`.

        Args:
            attention: The attention to replace.
            rpe: The encoding.
            grid: Height and width in tokens, without the skipped tokens; None for a square.

        Raises:
            ValueError: `attention` is of another class, or is not plain self-attention.
        """
        check_replaceable(attention, TORCH_ATTENTIONS)
        self = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            batch_first=attention.batch_first,
            grid=grid,
            device="meta",
        )
        self._set_encodings(rpe, attention.in_proj_weight.device, attention.in_proj_weight.dtype)
        # This comes before the layers, so that each of them keeps its own mode.
        self.train(attention.training)
        for name in ("in_proj_weight", "in_proj_bias", "out_proj"):
            setattr(self, name, getattr(attention, name))
        return self

    @property
    def has_rpe(self) -> bool:
        """True if there is an encoding on queries, keys or values."""
        return not (self.rpe_q is None and self.rpe_k is None and self.rpe_v is None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        hw: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments and masks of `nn.MultiheadAttention`, and the grid.

        Args:
            query: Tokens `(L, B, embed_dim)`, `(B, L, embed_dim)` with `batch_first`, or
                `(L, embed_dim)`.
            key: Tokens, shaped like `query`. With an encoding they must be the same tokens.
            value: Tokens, shaped like `key`.
            key_padding_mask: `(B, L)`, boolean with True on padding, or added to the logits.
            need_weights: Also return the attention weights, which is slower.
            attn_mask: `(L, L)` or `(B * num_heads, L, L)`, boolean with True where attention is
                not allowed, or added to the logits with the encodings.
            average_attn_weights: Return the mean of the weights over the heads.
            is_causal: A hint that `attn_mask` is causal.
            hw: The grid: height and width in tokens, without the skipped tokens. The tokens are in
                row-major order. None for the attribute `grid`, or a square if that is None too.
                Without an encoding, `hw` has no effect.

        Returns:
            The output, shaped like `query`, and the weights `(B, L, L)`, or
            `(B, num_heads, L, L)` if not averaged, or None.

        Raises:
            ValueError: The tokens do not form the grid, query and key differ in shape, or a mask
                has the wrong shape or dtype.
        """
        if not self.has_rpe:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if query.is_nested:
            raise ValueError(
                "query must be a padded tensor for relative positions, got a nested one: build the "
                "nn.TransformerEncoder with enable_nested_tensor=False or pass it to add_irpe"
            )
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, got None")
        if query.shape != key.shape:
            raise ValueError(
                "query and key must be the same tokens for relative positions, "
                f"got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        allowed = self._merge_masks(key_padding_mask, attn_mask, *q.shape[:3], q.dtype)
        grid = hw or self.grid or (None, None)
        out, weights = self._attend(q, k, v, allowed, grid, need_weights)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, *inputs: Tensor) -> list[Tensor]:
        """Return queries, keys and values `(B, H, L, d)`."""
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        # With unflatten, torch.onnx.export(dynamo=False) would make the batch size a constant.
        shape = inputs[0].shape[0], inputs[0].shape[1], self.num_heads, self.head_dim
        return [
            F.linear(x, weight, bias).reshape(shape).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        ]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        grid: tuple[int | None, int | None],
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output `(B, H, L, d)`, and the weights `(B, H, L, L)` or None."""
        dropout_p = self.dropout if self.training else 0.0
        encodings = (self.rpe_q, self.rpe_k, self.rpe_v)
        if not need_weights:
            height, width = grid
            out = rpe_attention(
                q, k, v, *encodings, height=height, width=width, attn_mask=mask, dropout_p=dropout_p
            )
            return out, None
        scale = self.head_dim**-0.5
        bias = add_mask(logit_bias(q, k, *encodings[:2], grid, scale), mask, q.dtype)
        attn_BHQK = attention_weights(q * scale, k, bias, has_mask=mask is not None)
        attn_BHQK = F.dropout(attn_BHQK, dropout_p, training=dropout_p > 0)
        out = attn_BHQK @ v
        return out if self.rpe_v is None else out + self.rpe_v(attn_BHQK, *grid), attn_BHQK

    @staticmethod
    def _merge_masks(
        padding: Tensor | None,
        attn_mask: Tensor | None,
        batch: int,
        heads: int,
        length: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Combine both masks into one for `rpe_attention`, where True means allowed."""
        masks = []
        if padding is not None:
            _check_shape("key_padding_mask", padding, (batch, length))
            masks.append(padding[:, None, None, :])
        if attn_mask is not None and attn_mask.dim() == 3:
            _check_shape("attn_mask", attn_mask, (batch * heads, length, length))
            masks.append(attn_mask.unflatten(0, (batch, heads)))
        elif attn_mask is not None:
            _check_shape("attn_mask", attn_mask, (length, length))
            masks.append(attn_mask)
        if not masks:
            return None
        if all(mask.dtype == torch.bool for mask in masks):
            return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
        return sum(
            torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
            if mask.dtype == torch.bool
            else mask
            for mask in masks
        )


def _check_shape(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if a mask has another shape."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(mask.shape)}")
