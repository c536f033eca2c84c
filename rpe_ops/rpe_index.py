"""`RPEIndexFunction` under the import path that users of the original operator know."""

from torch import Tensor

from rpe_ops.api import gather

__all__ = ["RPEIndexFunction"]


class RPEIndexFunction:
    """Drop-in for the original autograd function: `RPEIndexFunction.apply(input, index)`.

    The gradient comes from the operator itself, so this class only carries the name.
    """

    @staticmethod
    def apply(input: Tensor, index: Tensor) -> Tensor:
        """Gather `input` `(B, H, L_q, K)` by `index` `(L_q, L_k)` int32 to `(B, H, L_q, L_k)`.

        Raises:
            ValueError: `input` is not four-dimensional, or as in `rpe_ops.gather`.
            IndexError: A bucket out of range.
        """
        if input.ndim != 4:
            raise ValueError(f"input must be (B, H, L_q, K), got shape {tuple(input.shape)}")
        return gather(input, index)
