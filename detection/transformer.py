"""DETR's transformer: an encoder over the feature map, a decoder from queries to objects.

Absolute position encodings are added to queries and keys at every layer, never to values. iRPE
sits in the self-attention of the encoder, one set of tables per layer.

Source: DETR (Carion et al., ECCV 2020), section A.3, and iRPE (Wu et al., ICCV 2021). Parameter
names are those of the published checkpoints. What differs: tokens are batch-first, `(B, L, C)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from irpe_core import RPEConfig, RPEMultiheadAttention

__all__ = ["Transformer"]


class _Layer(nn.Module):
    """Residual blocks, each with a norm: the attentions given, and a feed-forward.

    Args:
        attentions: By name, in the order in which they are used.
        dim: Channels of the tokens.
        dim_feedforward: Hidden channels of the feed-forward block.
        dropout: Dropout probability.
        pre_norm: Normalize before each block instead of after.
    """

    def __init__(
        self,
        attentions: dict[str, nn.Module],
        dim: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        for name, attention in attentions.items():
            self.add_module(name, attention)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        for number in range(1, len(attentions) + 2):
            self.add_module(f"norm{number}", nn.LayerNorm(dim))
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def _residual(self, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(block(norm(x)))
        return norm(x + self.dropout(block(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.linear1(x).relu()))


class EncoderLayer(_Layer):
    """Self-attention with iRPE, then feed-forward."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
        rpe: RPEConfig | None,
    ) -> None:
        attention = RPEMultiheadAttention(dim, num_heads, dropout, batch_first=True, rpe=rpe)
        super().__init__({"self_attn": attention}, dim, dim_feedforward, dropout, pre_norm)

    def forward(
        self, x: Tensor, pos: Tensor, padding: Tensor | None, hw: tuple[int, int]
    ) -> Tensor:
        """Tokens `(B, h·w, C)`, their positions alike and padding `(B, h·w)` to tokens."""

        def attend(x: Tensor) -> Tensor:
            placed = x + pos
            return self.self_attn(placed, placed, x, padding, need_weights=False, hw=hw)[0]

        x = self._residual(x, self.norm1, attend)
        return self._residual(x, self.norm2, self._feed_forward)


class DecoderLayer(_Layer):
    """Self-attention among the queries, attention to the memory, then feed-forward."""

    def __init__(
        self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        attentions = {
            name: nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
            for name in ("self_attn", "multihead_attn")
        }
        super().__init__(attentions, dim, dim_feedforward, dropout, pre_norm)

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor | None
    ) -> Tensor:
        """Objects `(B, Q, C)` so far, over a memory `(B, h·w, C)`, to better ones."""

        def attend_to_queries(x: Tensor) -> Tensor:
            placed = x + query_pos
            return self.self_attn(placed, placed, x, need_weights=False)[0]

        def attend_to_memory(x: Tensor) -> Tensor:
            keys = memory + pos
            return self.multihead_attn(x + query_pos, keys, memory, padding, need_weights=False)[0]

        x = self._residual(x, self.norm1, attend_to_queries)
        x = self._residual(x, self.norm2, attend_to_memory)
        return self._residual(x, self.norm3, self._feed_forward)


class Encoder(nn.Module):
    """Layers, and behind pre-norm ones a last norm."""

    def __init__(self, layers: list[EncoderLayer], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self, x: Tensor, pos: Tensor, padding: Tensor | None, hw: tuple[int, int]
    ) -> Tensor:
        """As a layer."""
        for layer in self.layers:
            x = layer(x, pos, padding, hw)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """Layers, each of whose outputs is normalized and returned."""

    def __init__(self, layers: list[DecoderLayer], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor | None
    ) -> Tensor:
        """As a layer, but `(layers, B, Q, C)`."""
        outputs = []
        for layer in self.layers:
            x = layer(x, query_pos, memory, pos, padding)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """Encoder and decoder, Xavier-initialised, the tables of iRPE included.

    Args:
        dim: Channels of the tokens.
        num_heads: Heads of every attention.
        enc_layers: Layers of the encoder.
        dec_layers: Layers of the decoder.
        dim_feedforward: Hidden channels of the feed-forward blocks.
        dropout: Dropout probability, also of attention weights.
        pre_norm: Normalize before each block instead of after.
        rpe: The encoding in the encoder's self-attention; None for none.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        *,
        pre_norm: bool = False,
        rpe: RPEConfig | None = None,
    ) -> None:
        super().__init__()
        shape = (dim, num_heads, dim_feedforward, dropout, pre_norm)
        self.encoder = Encoder(
            [EncoderLayer(*shape, rpe) for _ in range(enc_layers)],
            nn.LayerNorm(dim) if pre_norm else None,
        )
        self.decoder = Decoder([DecoderLayer(*shape) for _ in range(dec_layers)], nn.LayerNorm(dim))
        self.dim = dim
        self.num_heads = num_heads
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, features: Tensor, mask: Tensor | None, queries: Tensor, pos: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Detect objects in a feature map.

        Args:
            features: `(B, C, h, w)`.
            mask: `(B, h, w)`, True on padding; None where there is none.
            queries: Position encodings of the queries, `(Q, C)`.
            pos: Position encodings of the map, like `features`.

        Returns:
            The outputs of every decoder layer `(layers, B, Q, C)`, and the memory `(B, C, h, w)`.
        """
        hw = tuple(features.shape[-2:])
        tokens, pos = (x.flatten(2).transpose(1, 2) for x in (features, pos))
        padding = None if mask is None else mask.flatten(1)
        memory = self.encoder(tokens, pos, padding, hw)
        queries = queries.expand(tokens.shape[0], -1, -1)
        outputs = self.decoder(torch.zeros_like(queries), queries, memory, pos, padding)
        return outputs, memory.transpose(1, 2).unflatten(2, hw)
