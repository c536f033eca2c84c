"""Distillation through DeiT's distillation token (Touvron et al., ICML 2021, Eq. 2 and 3).

    soft:  (1 - alpha)·base + alpha·tau²·KL(teacher/tau ‖ student/tau)
    hard:  (1 - alpha)·base + alpha·CE(student, argmax teacher)

`base` is the loss of the class head against the labels, `student` the distillation head.
"""

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

__all__ = ["base_criterion", "DistillationLoss"]


def base_criterion(*, mixed: bool, smoothing: float) -> nn.Module:
    """The loss against the labels: soft targets after mixup, else smoothed or plain."""
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """A loss against the labels combined with one against a teacher.

    Args:
        base: Loss of class logits `(B, C)` and targets.
        teacher: Gives logits `(B, C)` of the images; run without gradient, in evaluation mode.
        kind: `none`, `soft` or `hard`.
        alpha: Share of the teacher, in [0, 1].
        tau: Temperature of the soft kind, > 0.
    """

    def __init__(
        self, base: nn.Module, teacher: nn.Module | None, kind: str, alpha: float, tau: float
    ) -> None:
        super().__init__()
        self.base = base
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        # In a tuple the teacher is no submodule: it is neither trained nor saved.
        self._teacher = (teacher.eval(),) if teacher is not None else ()

    def forward(
        self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor
    ) -> Tensor:
        """Compute the loss.

        Args:
            images: `(B, 3, H, W)`, what the student saw.
            outputs: Logits `(B, C)`, or those of the class and the distillation head.
            targets: Class numbers `(B,)` or soft targets `(B, C)`.

        Returns:
            A scalar.

        Raises:
            ValueError: Distillation of a model that has no distillation head.
        """
        class_logits, student = outputs if isinstance(outputs, tuple) else (outputs, None)
        loss = self.base(class_logits, targets)
        if self.kind == "none":
            return loss
        if student is None:
            raise ValueError(
                f"distillation_type={self.kind!r} needs a model with a distillation token: "
                "add --distillation-token"
            )
        with torch.no_grad():
            teacher = self._teacher[0](images)
        if self.kind == "soft":
            divergence = F.kl_div(
                F.log_softmax(student / self.tau, -1),
                F.log_softmax(teacher / self.tau, -1),
                reduction="sum",
                log_target=True,
            )
            # The mean over all B·C entries, as the original has it, not over the B images.
            distillation = divergence * self.tau**2 / student.numel()
        else:
            distillation = F.cross_entropy(student, teacher.argmax(-1))
        return (1 - self.alpha) * loss + self.alpha * distillation
