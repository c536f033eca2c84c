"""The losses of DeiT, with its distillation (Touvron et al., ICML 2021, Eq. 2 and 3).

    soft:  (1 - alpha)·base + alpha·tau²·KL(teacher/tau ‖ student/tau)
    hard:  (1 - alpha)·base + alpha·CE(student, argmax teacher)

`base` is the loss of the class head on the labels, `student` the logits of the distillation head,
`teacher` those of the teacher.
"""

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

__all__ = ["base_criterion", "DistillationLoss"]


def base_criterion(*, mixed: bool, smoothing: float) -> nn.Module:
    """Return the cross-entropy on the labels.

    Args:
        mixed: Targets are soft, because mixup or cutmix is enabled; they are already smoothed.
        smoothing: Label smoothing of targets that are class numbers.
    """
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """The loss on the labels combined with the distillation loss.

    Args:
        base: Loss of class logits `(B, C)` and targets.
        teacher: Model that returns logits `(B, C)`, used in evaluation mode without gradient.
        kind: `none`, `soft` or `hard`.
        alpha: Weight of the distillation loss, in [0, 1].
        tau: Temperature of soft distillation, > 0.
    """

    def __init__(
        self, base: nn.Module, teacher: nn.Module | None, kind: str, alpha: float, tau: float
    ) -> None:
        super().__init__()
        self.base = base
        self.kind = kind
        self.alpha = alpha
        self.tau = tau
        # The tuple hides the teacher from nn.Module, so that it is not trained and not saved.
        self._teacher = (teacher.eval(),) if teacher is not None else ()

    def forward(
        self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor
    ) -> Tensor:
        """Compute the loss.

        Args:
            images: Images `(B, 3, H, W)` as the student gets them.
            outputs: Logits `(B, C)` of the class head, or of both heads.
            targets: Class numbers `(B,)` or soft targets `(B, C)`.

        Returns:
            A scalar.

        Raises:
            ValueError: The model has no distillation head.
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
            # As in DeiT's code, the mean is over all B·C entries, not over the B images.
            distillation = divergence * self.tau**2 / student.numel()
        else:
            distillation = F.cross_entropy(student, teacher.argmax(-1))
        return (1 - self.alpha) * loss + self.alpha * distillation
