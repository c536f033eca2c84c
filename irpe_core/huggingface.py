"""Self-attention of Hugging Face transformers (5 or newer) with relative position encoding.

    q, k, v = q_proj(x + p), k_proj(x + p), v_proj(x)
    out     = o_proj(rpe_attention(q, k, v))

The position embedding p exists in DETR only. `add_irpe` replaces the attentions of ViT, DeiT and
DINOv2, and those of the encoder of DETR. Parameter names stay the same. The module does not depend
on `attn_implementation`, and does not import transformers: it recognizes the classes by name.
"""

from torch import Tensor, nn

from irpe_core.config import RPEConfig
from irpe_core.encoding import build_rpe
from irpe_core.functional import rpe_attention
from irpe_core.replaceable import TRANSFORMERS_ATTENTIONS, check_replaceable, class_path

__all__ = [
    "RPETransformersAttention",
    "find_attentions",
    "find_projection",
    "prefix_tokens",
]

_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


class RPETransformersAttention(nn.Module):
    """An attention of Hugging Face transformers with relative position encoding.

    Args:
        attention: The attention, one of `TRANSFORMERS_ATTENTIONS`. Its layers are used.
        rpe: The encoding; its tables start at zero, so the outputs stay the same.
        grid: Height and width in tokens, without the skipped tokens; None for a square.

    Raises:
        ValueError: `attention` is of another class, or has other layers.
    """

    def __init__(
        self, attention: nn.Module, rpe: RPEConfig, grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        check_replaceable(attention, set(TRANSFORMERS_ATTENTIONS))
        self.config = attention.config
        self.is_causal = False
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        self.attention_dropout = attention.attention_dropout
        self.grid = grid
        for name in _LAYERS:
            setattr(self, name, getattr(attention, name))
        weight = self.q_proj.weight
        self.rpe_q, self.rpe_k, self.rpe_v = (
            table and table.to(weight.device, weight.dtype)
            for table in build_rpe(rpe, self.head_dim, len(weight) // self.head_dim)
        )
        self.training = attention.training

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Attend among the tokens.

        Args:
            hidden_states: Tokens `(B, L, C)`: first the skipped tokens, then the grid row by row.
            attention_mask: Mask `(B, 1, L, L)`, boolean with True where attention is allowed, or
                floating point, added to the logits.
            position_embeddings: Added to the input of queries and keys.
            **kwargs: Further arguments of transformers, which have no effect.

        Returns:
            The output `(B, L, C)`, and None instead of the attention weights.

        Raises:
            ValueError: The tokens do not form the grid, or the mask has another shape.
        """
        if attention_mask is not None and attention_mask.dim() != 4:
            raise ValueError(
                "attention_mask must have the shape (B, 1, L, L), got "
                f'{tuple(attention_mask.shape)}: load the model with attn_implementation="sdpa"'
            )
        x = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        shape = x.shape[0], x.shape[1], -1, self.head_dim
        q, k, v = (
            layer(each).reshape(shape).transpose(1, 2)
            for layer, each in ((self.q_proj, x), (self.k_proj, x), (self.v_proj, hidden_states))
        )
        height, width = self.grid or (None, None)
        out = rpe_attention(
            q,
            k,
            v,
            self.rpe_q,
            self.rpe_k,
            self.rpe_v,
            height=height,
            width=width,
            attn_mask=attention_mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attentions over an image by name, without those of a decoder."""
    found = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if class_path(module) in TRANSFORMERS_ATTENTIONS and not hasattr(parent, "encoder_attn"):
            found[name] = module
    return found


def find_projection(model: nn.Module) -> nn.Module | None:
    """Return the convolution whose output becomes the tokens; None if it is not in the model."""
    if not find_attentions(model):
        return None
    names = ("patch_embeddings.projection", "input_projection")
    return next((m for n, m in model.named_modules() if n.endswith(names)), None)


def prefix_tokens(attention: nn.Module) -> int:
    """Return the number of tokens before the grid in the model of an attention."""
    registers = getattr(attention.config, "num_register_tokens", 0)
    return TRANSFORMERS_ATTENTIONS[class_path(attention)] + registers
