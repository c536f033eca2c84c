"""Absolute position encodings of a feature map, added to queries and keys in every layer.

    sine:     sin(y / τ^(2i/F)), cos(y / τ^(2i/F)), …, then the same for x; y and x count the tokens
              that are not padding, scaled to at most 2π; τ is the temperature, F the channels
    learned:  one vector per column, concatenated with one per row
    none:     zero

Source: DETR (Carion et al., ECCV 2020), section A.4.
"""

import math

import torch
from torch import Tensor, nn

__all__ = [
    "SinePositionEncoding",
    "LearnedPositionEncoding",
    "NoPositionEncoding",
    "build_position_encoding",
]

_MAX_LEARNED = 50  # rows and columns


class SinePositionEncoding(nn.Module):
    """Sines and cosines of the normalized row and column.

    Args:
        num_features: Number of channels per axis; even.
        temperature: Ratio of the longest wavelength to the shortest.
    """

    def __init__(self, num_features: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.num_features = num_features
        self.temperature = temperature

    def forward(self, mask: Tensor) -> Tensor:
        """Encode the positions of feature maps.

        Args:
            mask: Mask `(B, h, w)`, True on padding.

        Returns:
            Encodings `(B, 2 * num_features, h, w)` float32; the channels of the row come first.
        """
        inside = ~mask
        frequency = torch.arange(self.num_features, device=mask.device) // 2
        wavelength = self.temperature ** (2 * frequency.float() / self.num_features)
        axes = []
        for dim in (1, 2):
            position = inside.cumsum(dim, dtype=torch.float32)
            longest = position.narrow(dim, position.shape[dim] - 1, 1)
            position = position / (longest + 1e-6) * (2 * math.pi)
            angle = position[..., None] / wavelength
            pairs = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1)
            axes.append(pairs.flatten(-2))
        return torch.cat(axes, -1).permute(0, 3, 1, 2)


class LearnedPositionEncoding(nn.Module):
    """A learned vector for each column and each row of feature maps of up to 50 × 50.

    Args:
        num_features: Number of channels per axis.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(_MAX_LEARNED, num_features)
        self.col_embed = nn.Embedding(_MAX_LEARNED, num_features)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Encode the positions of feature maps.

        Args:
            mask: Mask `(B, h, w)`; only its shape is used.

        Returns:
            Encodings `(B, 2 * num_features, h, w)`; the channels of the column come first.

        Raises:
            ValueError: The feature map has more than 50 rows or columns.
        """
        batch, height, width = mask.shape
        if max(height, width) > _MAX_LEARNED:
            raise ValueError(
                f"feature map must be at most {_MAX_LEARNED} x {_MAX_LEARNED} with "
                f"position_embedding 'learned', got {height} x {width}: "
                "use smaller images or 'sine'"
            )
        columns = self.col_embed.weight[:width].t()[:, None, :].expand(-1, height, -1)
        rows = self.row_embed.weight[:height].t()[:, :, None].expand(-1, -1, width)
        return torch.cat((columns, rows)).expand(batch, -1, -1, -1)


class NoPositionEncoding(nn.Module):
    """Zeros, for a detector without absolute positions.

    Args:
        num_features: Number of channels per axis.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, mask: Tensor) -> Tensor:
        """Return zeros `(B, 2 * num_features, h, w)` float32 for a mask `(B, h, w)`."""
        batch, height, width = mask.shape
        return torch.zeros(batch, 2 * self.num_features, height, width, device=mask.device)


def build_position_encoding(kind: str, hidden_dim: int) -> nn.Module:
    """Build a position encoding.

    Args:
        kind: `sine`, `learned` or `none`.
        hidden_dim: Number of channels.

    Raises:
        ValueError: The kind is unknown, or does not allow this number of channels.
    """
    if kind not in _KINDS:
        raise ValueError(f"position_embedding must be sine, learned or none, got {kind!r}")
    parts = 4 if kind == "sine" else 2
    if hidden_dim % parts:
        raise ValueError(
            f"hidden_dim must be a multiple of {parts} for position_embedding {kind!r}, "
            f"got {hidden_dim}"
        )
    return _KINDS[kind](hidden_dim // 2)


_KINDS = {
    "sine": SinePositionEncoding,
    "learned": LearnedPositionEncoding,
    "none": NoPositionEncoding,
}
