"""Evaluation: independent of batch size, processes and order; the published protocol on request."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detection import criterion
from detection.coco_eval import METRICS, CocoEvaluator
from detection.criterion import SetCriterion
from detection.evaluate import evaluate
from detection.matcher import HungarianMatcher
from detection.postprocess import PostProcess, PostProcessSegm
from tests.detection.test_coco_eval import annotation, coco
from tests.detection.threads import as_processes

CPU = torch.device("cpu")
CLASSES, QUERIES = 4, 6
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_ce_0": 1.0}


class ToyDetector(nn.Module):
    """A convolution, the mean over what is not padded, and heads: DETR's face without the rest.

    The convolution sees the padding, as DETR's backbone does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, padding=2)
        self.norm = nn.BatchNorm2d(8)
        self.logits = nn.Linear(8, QUERIES * (CLASSES + 1))
        self.boxes = nn.Linear(8, QUERIES * 4)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images, mask):
        self.seen.append(tuple(images.shape))
        features = self.norm(self.conv(images).add(1).relu()) * ~mask[:, None]
        mean = features.sum((2, 3)) / (~mask).sum((1, 2))[:, None]
        made = {
            "pred_logits": 9 * self.logits(mean).unflatten(1, (QUERIES, CLASSES + 1)),
            "pred_boxes": self.boxes(mean).unflatten(1, (QUERIES, 4)).sigmoid(),
        }
        made["pred_masks"] = made["pred_boxes"][..., None] - torch.linspace(0, 1, 8)
        return made | {"aux_outputs": [{k: v.flip(1) for k, v in made.items()}]}


def sample(i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Image i of one of three sizes, with i % 4 objects."""
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
    """Batches padded to their largest image."""
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
    judge = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, losses)
    post = {"bbox": PostProcess()} | ({"segm": PostProcessSegm()} if masks else {})
    evaluator = evaluator or CocoEvaluator(truth(), tuple(post))
    return evaluate(model, judge, post, loader, evaluator, CPU, dtype, pad_to_batch=pad_to_batch)


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize("batch_size", [2, 4, 11])
def test_neither_batch_size_nor_order_changes_a_figure(model, batch_size, masks):
    alone = run(model, batches(range(IMAGES), 1), masks=masks)
    order = torch.randperm(IMAGES).tolist()
    together = run(model, batches(order, batch_size), masks=masks)
    assert together == pytest.approx(alone, abs=1e-5)
    assert 0 < alone["AP50"] < 1


def test_images_of_equal_size_go_together_and_unpadded(model):
    run(model, batches(range(6), 6))
    assert model.seen == [(2, 3, 20, 28), (2, 3, 28, 20), (2, 3, 24, 24)]


def test_the_published_protocol_pads_to_the_batch(model):
    run(model, batches(range(6), 6), pad_to_batch=True)
    assert model.seen == [(6, 3, 28, 28)]


def test_the_published_protocol_depends_on_the_batch_size_as_documented(model):
    small, large = (run(model, batches(range(IMAGES), n), pad_to_batch=True) for n in (1, 6))
    assert small["loss_bbox"] != pytest.approx(large["loss_bbox"], abs=1e-5)


def test_losses_are_means_over_images_and_the_class_error_over_objects(model):
    figures = run(model, batches(range(IMAGES), 4))
    judge = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, ("labels", "boxes")).eval()
    model.eval()
    ce, bbox, wrong, objects = [], [], 0.0, 0
    with torch.no_grad():
        for images, mask, targets in batches(range(IMAGES), 1):
            of_image = judge(model(images, mask), targets)
            ce.append(of_image["loss_ce"].item())
            bbox.append(of_image["loss_bbox"].item())
            count = len(targets[0]["labels"])
            wrong += of_image["class_error"].item() * count
            objects += count
    assert figures["loss_ce"] == pytest.approx(sum(ce) / IMAGES, rel=1e-5)
    assert figures["loss_bbox"] == pytest.approx(sum(bbox) / IMAGES, rel=1e-5)
    assert figures["class_error"] == pytest.approx(wrong / objects)
    total = sum(weight * figures[name] for name, weight in WEIGHTS.items())
    assert figures["loss"] == pytest.approx(total)


def test_the_published_losses_are_means_over_batches(model):
    figures = run(model, batches(range(IMAGES), 4), pad_to_batch=True)
    judge = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, ("boxes",)).eval()
    model.eval()
    with torch.no_grad():
        means = [
            judge(model(images, mask), targets)["loss_giou"].item()
            for images, mask, targets in batches(range(IMAGES), 4)
        ]
    assert figures["loss_giou"] == pytest.approx(sum(means) / 3, rel=1e-5)


def test_figures_have_their_names(model):
    figures = run(model, batches(range(IMAGES), 4), masks=True)
    assert list(figures)[:3] == ["loss", "loss_ce", "class_error"]
    assert {"loss_mask", "loss_dice", "loss_ce_0", *METRICS} <= set(figures)
    assert {f"segm_{name}" for name in METRICS} <= set(figures)
    assert all(isinstance(value, float) for value in figures.values())


def test_the_modes_of_model_and_criterion_are_put_back(model):
    judge = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, ("labels",))
    before = model.norm.running_mean.clone()
    post, evaluator = {"bbox": PostProcess()}, CocoEvaluator(truth())
    for training in (True, False):
        model.train(training)
        evaluate(model, judge, post, batches(range(3), 2), evaluator, CPU)
        assert (model.training, judge.training) == (training, True)
    assert torch.equal(model.norm.running_mean, before)


def test_an_evaluator_used_again_starts_empty(model):
    judge = SetCriterion(CLASSES, HungarianMatcher(), WEIGHTS, 0.1, ("labels",))
    post, evaluator = {"bbox": PostProcess()}, CocoEvaluator(truth())
    first = evaluate(model, judge, post, batches(range(IMAGES), 4), evaluator, CPU)
    with torch.no_grad():
        model.logits.bias.copy_(torch.randn_like(model.logits.bias))
    second = evaluate(model, judge, post, batches(range(IMAGES), 4), evaluator, CPU)
    assert first["AP"] != second["AP"]
    fresh = evaluate(model, judge, post, batches(range(IMAGES), 4), CocoEvaluator(truth()), CPU)
    assert second == fresh


def test_bfloat16_changes_the_forward_pass_alone(model):
    dtypes = (torch.float32, torch.bfloat16)
    exact, mixed = (run(model, batches(range(IMAGES), 4), dtype=dtype) for dtype in dtypes)
    assert mixed["loss_bbox"] == pytest.approx(exact["loss_bbox"], rel=0.05)
    assert mixed != exact


@pytest.mark.parametrize("count", [2, 3, 5], ids=lambda n: f"{n} processes")
@pytest.mark.parametrize("pad_to_batch", [False, True], ids=["unpadded", "padded"])
def test_processes_agree_with_one_to_the_last_bit(model, monkeypatch, count, pad_to_batch):
    """Four batches: with three processes one has more than the others, of five one has none."""
    everything = list(batches(range(IMAGES), 3))
    alone = run(model, everything, pad_to_batch=pad_to_batch)
    # Nobody may wait for others while going through the data.
    monkeypatch.setattr(criterion, "all_reduce_sum", None)
    models = [copy.deepcopy(model) for _ in range(count)]
    evaluators = [CocoEvaluator(truth()) for _ in range(count)]

    def work(rank: int) -> dict[str, float]:
        share = everything[rank::count]
        return run(models[rank], share, evaluators[rank], pad_to_batch=pad_to_batch)

    assert as_processes(monkeypatch, count, work) == [alone] * count
