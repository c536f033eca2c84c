"""The distillation loss against its equations, its teacher, and the loss on the labels."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from classification.losses import DistillationLoss, base_criterion

IMAGES = torch.randn(5, 7)
TARGETS = torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture
def teacher() -> nn.Module:
    return nn.Linear(7, 3)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_soft_loss_is_the_equation(teacher):
    tau, alpha = 3.0, 0.3
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", alpha, tau)
    p = (teacher(IMAGES) / tau).softmax(-1)
    divergence = (p * (p.log() - (logits(1) / tau).log_softmax(-1))).sum() / 15
    expected = (1 - alpha) * F.cross_entropy(logits(0), TARGETS) + alpha * tau**2 * divergence
    torch.testing.assert_close(loss(IMAGES, (logits(0), logits(1)), TARGETS), expected)


def test_hard_loss_is_the_equation(teacher):
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard", 0.25, 1.0)
    labels = teacher(IMAGES).argmax(-1)
    expected = 0.75 * F.cross_entropy(logits(0), TARGETS)
    expected = expected + 0.25 * F.cross_entropy(logits(1), labels)
    torch.testing.assert_close(loss(IMAGES, (logits(0), logits(1)), TARGETS), expected)


def test_teacher_is_neither_trained_nor_part_of_the_loss_module(teacher):
    teacher.train()
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 1.0)
    loss(IMAGES, (logits(0), logits(1)), TARGETS).backward()
    assert not teacher.training
    assert teacher.weight.grad is None
    assert not list(loss.parameters())


def test_model_without_a_distillation_head_is_refused(teacher):
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard", 0.5, 1.0)
    with pytest.raises(ValueError, match="distillation token"):
        loss(IMAGES, logits(0), TARGETS)


def test_base_criterion_follows_the_targets():
    assert isinstance(base_criterion(mixed=True, smoothing=0.1), SoftTargetCrossEntropy)
    assert isinstance(base_criterion(mixed=False, smoothing=0.1), LabelSmoothingCrossEntropy)
    assert isinstance(base_criterion(mixed=False, smoothing=0.0), nn.CrossEntropyLoss)
