"""`RPEIndexFunction`, the interface of the original iRPE operator."""

from torch import Tensor

from rpe_ops.api import gather

__all__ = ["RPEIndexFunction"]


class RPEIndexFunction:
    """Drop-in replacement of the original autograd function, used as `RPEIndexFunction.apply`.

    It calls `rpe_ops.gather`, which is differentiable, and keeps the original argument names.
    """

    @staticmethod
    def apply(input: Tensor, index: Tensor) -> Tensor:
        """Gather `input` `(B, H, L_q, K)` by `index` `(L_q, L_k)` int32 to `(B, H, L_q, L_k)`.

        Raises:
            ValueError: `input` is not four-dimensional, or see `rpe_ops.gather`.
            IndexError: A bucket id is out of range.
        """
        if input.ndim != 4:
            raise ValueError(f"input must have shape (B, H, L_q, K), got {tuple(input.shape)}")
        return gather(input, index)
