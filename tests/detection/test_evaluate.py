"""Evaluation: batch size, processes and order have no effect; the published protocol."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detection import criterion
from detection.coco_eval import METRICS, CocoEvaluator
from detection.criterion import SetCriterion
from detection.evaluation import evaluate
from detection.matcher import HungarianMatcher
from detection.postprocess import PostProcess, PostProcessSegm
from tests.detection.test_coco_eval import annotation, coco
from tests.detection.threads import as_processes

CPU = torch.device("cpu")
CLASSES, QUERIES = 4, 6
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_ce_0": 1.0}


class ToyDetector(nn.Module):
    """A model with the interface of DETR: a convolution, a mean without padding, and heads.

    Padding changes the output of the convolution, as in the backbone of DETR.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.logits = nn.Linear(8, QUERIES * (CLASSES + 1))
        self.boxes = nn.Linear(8, QUERIES * 4)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images, mask):
        self.shapes.append(tuple(images.shape))
        features = self.norm(self.conv(images).add(1).relu()) * ~mask[:, None]
        mean = features.sum((2, 3)) / (~mask).sum((1, 2))[:, None]
        made = {
            "pred_logits": 9 * self.logits(mean).unflatten(1, (QUERIES, CLASSES + 1)),
            "pred_boxes": self.boxes(mean).unflatten(1, (QUERIES, 4)).sigmoid(),
        }
        made["pred_masks"] = made["pred_boxes"][..., None] - torch.linspace(0, 1, 8)
        return made | {"aux_outputs": [{k: v.flip(1) for k, v in made.items()}]}


def sample(i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return image i, which has one of three sizes, and its target with i % 4 objects."""
    generator = torch.Generator().manual_seed(i)
    height, width = [(20, 28), (28, 20), (24, 24)][i % 3]
    sizes = 0.3 + 0.2 * torch.rand(i % 4, 2, generator=generator)
    centers = sizes / 2 + (1 - sizes) * torch.rand(i % 4, 2, generator=generator)
    target = {
        "image_id": torch.tensor([10 * (i + 1)]),
        "labels": torch.randint(CLASSES, (i % 4,), generator=generator),
        "boxes": torch.cat([centers, sizes], dim=1),
        "size": torch.tensor([height, width]),
        "orig_size": torch.tensor([200, 200]),
        "masks": torch.rand(i % 4, height, width, generator=generator) > 0.5,
    }
    return torch.randn(3, height, width, generator=generator), target


def batches(order, batch_size: int):
    """Yield batches, padded to their largest image."""
    for start in range(0, len(order), batch_size):
        images, targets = zip(*map(sample, order[start : start + batch_size]), strict=True)
        height, width = (max(image.shape[d] for image in images) for d in (1, 2))
        padding = [(0, width - i.shape[2], 0, height - i.shape[1]) for i in images]
        padded = [F.pad(i, p) for i, p in zip(images, padding, strict=True)]
        mask = [
            F.pad(torch.zeros(i.shape[1:]), p, value=1.0)
            for i, p in zip(images, padding, strict=True)
        ]
        yield torch.stack(padded), torch.stack(mask).bool(), list(targets)


IMAGES = 11


def truth():
    objects = []
    for i in range(IMAGES):
        target = sample(i)[1]
        for label, (x, y, w, h) in zip(
            target["labels"].tolist(), (200 * target["boxes"]).tolist(), strict=True
        ):
            box = [x - w / 2, y - h / 2, w, h]
            objects.append(annotation(len(objects) + 1, 10 * (i + 1), label, box))
    return coco(objects, IMAGES, tuple(range(CLASSES)))


@pytest.fixture
def model() -> ToyDetector:
    torch.manual_seed(3)
    return ToyDetector()


def run(model, loader, evaluator=None, *, masks=False, dtype=torch.float32, pad_to_batch=False):
    losses = ("labels", "boxes", "cardinality", *(["masks"] if masks else []))
    loss_fn = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, losses)
    post = {"bbox": PostProcess()} | ({"segm": PostProcessSegm()} if masks else {})
    evaluator = evaluator or CocoEvaluator(truth(), tuple(post))
    return evaluate(model, loss_fn, post, loader, evaluator, CPU, dtype, pad_to_batch=pad_to_batch)


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize("batch_size", [2, 4, 11])
def test_metrics_do_not_depend_on_batch_size_and_order(model, batch_size, masks):
    alone = run(model, batches(range(IMAGES), 1), masks=masks)
    order = torch.randperm(IMAGES).tolist()
    together = run(model, batches(order, batch_size), masks=masks)
    assert together == pytest.approx(alone, abs=1e-5)
    assert 0 < alone["AP50"] < 1


def test_images_of_equal_size_are_grouped_without_padding(model):
    run(model, batches(range(6), 6))
    assert model.shapes == [(2, 3, 20, 28), (2, 3, 28, 20), (2, 3, 24, 24)]


def test_the_published_protocol_pads_to_the_batch(model):
    run(model, batches(range(6), 6), pad_to_batch=True)
    assert model.shapes == [(6, 3, 28, 28)]


def test_the_published_protocol_depends_on_the_batch_size_as_documented(model):
    small, large = (run(model, batches(range(IMAGES), n), pad_to_batch=True) for n in (1, 6))
    assert small["loss_bbox"] != pytest.approx(large["loss_bbox"], abs=1e-5)


def test_losses_are_means_over_images_and_the_class_error_over_objects(model):
    metrics = run(model, batches(range(IMAGES), 4))
    loss_fn = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, ("labels", "boxes")).eval()
    model.eval()
    ce, bbox, wrong, objects = [], [], 0.0, 0
    with torch.no_grad():
        for images, mask, targets in batches(range(IMAGES), 1):
            image_metrics = loss_fn(model(images, mask), targets)
            ce.append(image_metrics["loss_ce"].item())
            bbox.append(image_metrics["loss_bbox"].item())
            count = len(targets[0]["labels"])
            wrong += image_metrics["class_error"].item() * count
            objects += count
    assert metrics["loss_ce"] == pytest.approx(sum(ce) / IMAGES, rel=1e-5)
    assert metrics["loss_bbox"] == pytest.approx(sum(bbox) / IMAGES, rel=1e-5)
    assert metrics["class_error"] == pytest.approx(wrong / objects)
    total = sum(weight * metrics[name] for name, weight in WEIGHTS.items())
    assert metrics["loss"] == pytest.approx(total)


def test_the_published_losses_are_means_over_batches(model):
    metrics = run(model, batches(range(IMAGES), 4), pad_to_batch=True)
    loss_fn = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, ("boxes",)).eval()
    model.eval()
    with torch.no_grad():
        means = [
            loss_fn(model(images, mask), targets)["loss_giou"].item()
            for images, mask, targets in batches(range(IMAGES), 4)
        ]
    assert metrics["loss_giou"] == pytest.approx(sum(means) / 3, rel=1e-5)


def test_metrics_have_the_documented_names(model):
    metrics = run(model, batches(range(IMAGES), 4), masks=True)
    assert list(metrics)[:3] == ["loss", "loss_ce", "class_error"]
    assert {"loss_mask", "loss_dice", "loss_ce_0", *METRICS} <= set(metrics)
    assert {f"segm_{name}" for name in METRICS} <= set(metrics)
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_modes_of_model_and_criterion_are_restored(model):
    loss_fn = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, ("labels",))
    before = model.norm.running_mean.clone()
    post, evaluator = {"bbox": PostProcess()}, CocoEvaluator(truth())
    for training in (True, False):
        model.train(training)
        evaluate(model, loss_fn, post, batches(range(3), 2), evaluator, CPU)
        assert (model.training, loss_fn.training) == (training, True)
    assert torch.equal(model.norm.running_mean, before)


def test_the_evaluator_is_reset(model):
    loss_fn = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, ("labels",))
    post, evaluator = {"bbox": PostProcess()}, CocoEvaluator(truth())
    first = evaluate(model, loss_fn, post, batches(range(IMAGES), 4), evaluator, CPU)
    with torch.no_grad():
        model.logits.bias.copy_(torch.randn_like(model.logits.bias))
    second = evaluate(model, loss_fn, post, batches(range(IMAGES), 4), evaluator, CPU)
    assert first["AP"] != second["AP"]
    fresh = evaluate(model, loss_fn, post, batches(range(IMAGES), 4), CocoEvaluator(truth()), CPU)
    assert second == fresh


def test_bfloat16_changes_the_metrics_slightly(model):
    dtypes = (torch.float32, torch.bfloat16)
    exact, mixed = (run(model, batches(range(IMAGES), 4), dtype=dtype) for dtype in dtypes)
    assert mixed["loss_bbox"] == pytest.approx(exact["loss_bbox"], rel=0.05)
    assert mixed != exact


@pytest.mark.parametrize("count", [2, 3, 5], ids=lambda n: f"{n} processes")
@pytest.mark.parametrize("pad_to_batch", [False, True], ids=["unpadded", "padded"])
def test_several_processes_have_the_metrics_of_one_bit_for_bit(
    model, monkeypatch, count, pad_to_batch
):
    """With four batches, some processes have two batches and others none."""
    everything = list(batches(range(IMAGES), 3))
    alone = run(model, everything, pad_to_batch=pad_to_batch)
    # Processes must not wait for each other before all batches are evaluated.
    monkeypatch.setattr(criterion, "all_reduce_sum", None)
    models = [copy.deepcopy(model) for _ in range(count)]
    evaluators = [CocoEvaluator(truth()) for _ in range(count)]

    def work(rank: int) -> dict[str, float]:
        share = everything[rank::count]
        return run(models[rank], share, evaluators[rank], pad_to_batch=pad_to_batch)

    assert as_processes(monkeypatch, count, work) == [alone] * count
