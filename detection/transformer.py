"""The transformer of DETR: an encoder of the feature map, and a decoder from queries to objects.

Absolute position encodings are added to queries and keys in every layer, but not to values. iRPE is
in the self-attention of the encoder; each layer has its own tables. Parameter names are those of
the published checkpoints. One thing differs from the original: tokens are batch-first, `(B, L, C)`.

Source: DETR (Carion et al., ECCV 2020), section A.3, and iRPE (Wu et al., ICCV 2021).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from detection.recompute import run_layer
from irpe_core import RPEConfig, RPEMultiheadAttention

__all__ = ["Transformer"]


class _Layer(nn.Module):
    """Base class of a layer: residual attention blocks and a feed-forward block, each with a norm.

    Args:
        attentions: Attention modules by name, in the order of their use.
        dim: Number of channels of a token.
        dim_feedforward: Number of hidden channels of the feed-forward block.
        dropout: Dropout probability.
        pre_norm: Normalize before each block instead of after it.
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
        """Add the output of a block to its input, and normalize before or after."""
        if self.pre_norm:
            return x + self.dropout(block(norm(x)))
        return norm(x + self.dropout(block(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward block to each token."""
        return self.linear2(self.dropout(self.linear1(x).relu()))


class EncoderLayer(_Layer):
    """An encoder layer: self-attention with iRPE, then feed-forward; arguments as `Transformer`."""

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
        """Encode tokens.

        Args:
            x: Tokens `(B, h·w, C)`.
            pos: Position encodings of the tokens, `(B, h·w, C)`.
            padding: Mask `(B, h·w)`, True on padding; None without padding.
            hw: Grid: height and width in tokens.

        Returns:
            Tokens `(B, h·w, C)`.
        """

        def attend(x: Tensor) -> Tensor:
            query = key = x + pos
            return self.self_attn(query, key, x, padding, need_weights=False, hw=hw)[0]

        x = self._residual(x, self.norm1, attend)
        return self._residual(x, self.norm2, self._feed_forward)


class DecoderLayer(_Layer):
    """A decoder layer: self-attention of the queries, attention to the memory, feed-forward."""

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
        """Refine objects.

        Args:
            x: Objects `(B, Q, C)`.
            query_pos: Position encodings of the queries, `(B, Q, C)`.
            memory: Output of the encoder, `(B, h·w, C)`.
            pos: Position encodings of the memory, `(B, h·w, C)`.
            padding: Mask `(B, h·w)` of the memory, True on padding; None without padding.

        Returns:
            Objects `(B, Q, C)`.
        """

        def attend_to_queries(x: Tensor) -> Tensor:
            query = key = x + query_pos
            return self.self_attn(query, key, x, need_weights=False)[0]

        def attend_to_memory(x: Tensor) -> Tensor:
            query, key = x + query_pos, memory + pos
            return self.multihead_attn(query, key, memory, padding, need_weights=False)[0]

        x = self._residual(x, self.norm1, attend_to_queries)
        x = self._residual(x, self.norm2, attend_to_memory)
        return self._residual(x, self.norm3, self._feed_forward)


class Encoder(nn.Module):
    """A sequence of encoder layers, with a last norm if they are pre-norm layers."""

    def __init__(self, layers: list[EncoderLayer], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(
        self, x: Tensor, pos: Tensor, padding: Tensor | None, hw: tuple[int, int]
    ) -> Tensor:
        """Encode tokens; arguments and result as `EncoderLayer.forward`."""
        for layer in self.layers:
            x = run_layer(layer, x, pos, padding, hw, recompute=self.grad_checkpointing)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """A sequence of decoder layers; the outputs of all layers are normalized and returned."""

    def __init__(self, layers: list[DecoderLayer], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, pos: Tensor, padding: Tensor | None
    ) -> Tensor:
        """Refine objects; as `DecoderLayer.forward`, with the result `(layers, B, Q, C)`."""
        outputs = []
        for layer in self.layers:
            inputs = x, query_pos, memory, pos, padding
            x = run_layer(layer, *inputs, recompute=self.grad_checkpointing)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """Encoder and decoder. All matrices, also the tables of iRPE, have Xavier initialization.

    Args:
        dim: Number of channels of a token.
        num_heads: Number of attention heads.
        enc_layers: Number of encoder layers.
        dec_layers: Number of decoder layers.
        dim_feedforward: Number of hidden channels of the feed-forward blocks.
        dropout: Dropout probability, also of attention weights.
        pre_norm: Normalize before each block instead of after it.
        rpe: iRPE of the self-attention in the encoder; None for none.
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
            features: Feature map `(B, C, h, w)`.
            mask: Mask `(B, h, w)`, True on padding; None without padding.
            queries: Position encodings of the queries, `(Q, C)`.
            pos: Position encodings of the feature map, `(B, C, h, w)`.

        Returns:
            The outputs of every decoder layer `(layers, B, Q, C)`, and the output of the encoder
            `(B, C, h, w)`.
        """
        hw = tuple(features.shape[-2:])
        tokens, pos = (x.flatten(2).transpose(1, 2) for x in (features, pos))
        padding = None if mask is None else mask.flatten(1)
        memory = self.encoder(tokens, pos, padding, hw)
        queries = queries.expand(tokens.shape[0], -1, -1)
        outputs = self.decoder(torch.zeros_like(queries), queries, memory, pos, padding)
        return outputs, memory.transpose(1, 2).unflatten(2, hw)
