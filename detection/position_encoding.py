"""Absolute position encodings of a feature map, added to queries and keys at every layer.

    sine:     sin(y / T^(2i/F)), cos(y / T^(2i/F)), …, then the same of x; positions count the
              pixels that are not padding and run from 0 to 2π
    learned:  one vector per column beside one per row

Source: DETR (Carion et al., ECCV 2020), section A.4.
"""

import math

import torch
from torch import Tensor, nn

__all__ = ["SinePositionEncoding", "LearnedPositionEncoding", "build_position_encoding"]

_LONGEST_LEARNED = 50


class SinePositionEncoding(nn.Module):
    """Sines and cosines of the normalized row and column.

    Args:
        num_features: Channels per axis; even.
        temperature: Ratio of the longest wavelength to the shortest.
    """

    def __init__(self, num_features: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.num_features = num_features
        self.temperature = temperature

    def forward(self, mask: Tensor) -> Tensor:
        """Encode a batch of maps.

        Args:
            mask: `(B, h, w)`, True on padding.

        Returns:
            `(B, 2 * num_features, h, w)` float32, features of the row first.
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
    """A learned vector for each column and each row, on maps of up to 50 × 50.

    Args:
        num_features: Channels per axis.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(_LONGEST_LEARNED, num_features)
        self.col_embed = nn.Embedding(_LONGEST_LEARNED, num_features)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Encode a batch of maps; of `mask (B, h, w)` only the shape matters.

        Returns:
            `(B, 2 * num_features, h, w)`, features of the column first.

        Raises:
            ValueError: The map is longer than the table.
        """
        batch, height, width = mask.shape
        if max(height, width) > _LONGEST_LEARNED:
            raise ValueError(
                f"position_embedding 'learned' has {_LONGEST_LEARNED} rows and columns, the "
                f"feature map has {height} x {width}: use smaller images or 'sine'"
            )
        columns = self.col_embed.weight[:width].t()[:, None, :].expand(-1, height, -1)
        rows = self.row_embed.weight[:height].t()[:, :, None].expand(-1, -1, width)
        return torch.cat((columns, rows)).expand(batch, -1, -1, -1)


def build_position_encoding(kind: str, hidden_dim: int) -> nn.Module:
    """The encoding of `--position_embedding`, `hidden_dim` channels in all.

    Raises:
        ValueError: An unknown kind, or a number of channels that cannot be divided.
    """
    if kind not in ("sine", "learned"):
        raise ValueError(f"position_embedding must be sine or learned, got {kind!r}")
    parts = 4 if kind == "sine" else 2
    if hidden_dim % parts:
        raise ValueError(
            f"hidden_dim must be a multiple of {parts} for position_embedding {kind!r}, "
            f"got {hidden_dim}"
        )
    encoding = SinePositionEncoding if kind == "sine" else LearnedPositionEncoding
    return encoding(hidden_dim // 2)
