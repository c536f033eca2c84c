"""The mask head of DETR: attention maps of the objects, refined with features of the backbone.

    maps  = softmax over heads, rows and columns of q(object) · k(memory)
    masks = convolutions on (features, maps), upsampled from level to level of the backbone

Parameter names are those of the published panoptic checkpoints. As in these, the softmax includes
the heads.

Source: DETR (Carion et al., ECCV 2020), section 4.4 and figure 8.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.detr import DETR

__all__ = ["DETRSegmentation", "AttentionMap", "MaskHead"]

_LEVELS = 4


class DETRSegmentation(nn.Module):
    """A detector with a mask head.

    Args:
        detr: The detector.
        freeze_detr: Freeze the detector, so that only the mask head is trained.
    """

    def __init__(self, detr: DETR, *, freeze_detr: bool = False) -> None:
        super().__init__()
        self.detr = detr
        dim, heads = detr.transformer.dim, detr.transformer.num_heads
        finer = detr.backbone[0].channels[-_LEVELS:-1]
        self.bbox_attention = AttentionMap(dim, heads)
        self.mask_head = MaskHead(dim + heads, dim, finer[::-1])
        if freeze_detr:
            detr.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers of the detector in the backward pass; see `DETR`."""
        self.detr.set_grad_checkpointing(enable)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Detect and segment objects.

        Args:
            images: See `DETR.forward`.
            mask: See `DETR.forward`.

        Returns:
            The entries of `DETR.forward`, and the logits `pred_masks (B, Q, h, w)`. They have the
            resolution of the finest of four levels: a quarter of the images for a ResNet of stride
            32.
        """
        encoded = self.detr.encode(images, mask, levels=_LEVELS)
        outputs = self.detr.predict(encoded.objects)
        maps = self.bbox_attention(encoded.objects[-1], encoded.memory, encoded.mask)
        masks = self.mask_head(encoded.projected, maps, encoded.levels[-2::-1])
        outputs["pred_masks"] = masks
        return outputs


class AttentionMap(nn.Module):
    """The attention of each object over the memory, one map per head.

    Args:
        dim: Number of channels of objects and memory.
        num_heads: Number of maps.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim / num_heads) ** -0.5
        self.q_linear = nn.Linear(dim, dim)
        self.k_linear = nn.Linear(dim, dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, objects: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the attention maps.

        Args:
            objects: Outputs of the last decoder layer, `(B, Q, C)`.
            memory: Output of the encoder, `(B, C, h, w)`.
            mask: Mask `(B, h, w)`, True on padding; None without padding.

        Returns:
            Maps `(B, Q, num_heads, h, w)`; those of an object sum to 1.
        """
        q = self.q_linear(objects).unflatten(-1, (self.num_heads, -1))
        k = self.k_linear(memory.movedim(1, -1)).unflatten(-1, (self.num_heads, -1))
        logits = torch.einsum("bqnc,bhwnc->bqnhw", q * self.scale, k)
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None], float("-inf"))
        return logits.flatten(2).softmax(-1).view_as(logits)


class MaskHead(nn.Module):
    """Convolutions from the maps of an object to its mask, from coarse to fine.

    Args:
        dim: Number of channels of features and maps together.
        context_dim: Number of channels of the features; each layer has a fraction of it.
        level_channels: Number of channels of the three finer levels of the backbone, coarsest
            first.
    """

    def __init__(self, dim: int, context_dim: int, level_channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (dim, dim, *(context_dim // 2**i for i in range(1, 5)))
        for number, (before, after) in enumerate(pairwise(widths), 1):
            self.add_module(f"lay{number}", nn.Conv2d(before, after, 3, padding=1))
            # Eight groups, or fewer if the channels of a narrow model are not divisible by eight.
            self.add_module(f"gn{number}", nn.GroupNorm(math.gcd(8, after), after))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for number, (before, after) in enumerate(zip(level_channels, widths[2:5], strict=True), 1):
            self.add_module(f"adapter{number}", nn.Conv2d(before, after, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, maps: Tensor, levels: list[Tensor]) -> Tensor:
        """Compute the masks.

        Args:
            features: Input of the encoder, `(B, C, h, w)`.
            maps: Attention maps `(B, Q, num_heads, h, w)`.
            levels: Finer features of the backbone, coarsest first.

        Returns:
            Logits `(B, Q, h', w')` at the resolution of the last level.
        """
        queries = maps.shape[1]
        x = torch.cat((_repeat(features, queries), maps.flatten(0, 1)), 1)
        x = self._block(2, self._block(1, x))
        for number, level in enumerate(levels, 1):
            level = _repeat(self.get_submodule(f"adapter{number}")(level), queries)
            x = level + F.interpolate(x, size=level.shape[-2:], mode="nearest")
            x = self._block(number + 2, x)
        return self.out_lay(x).unflatten(0, (-1, queries))[:, :, 0]

    def _block(self, number: int, x: Tensor) -> Tensor:
        """Apply a convolution, its norm and ReLU."""
        x = self.get_submodule(f"lay{number}")(x)
        return self.get_submodule(f"gn{number}")(x).relu()


def _repeat(x: Tensor, times: int) -> Tensor:
    """Repeat each image, from `(B, ...)` to `(B * times, ...)`; its copies are adjacent."""
    return x.repeat_interleave(times, 0)
