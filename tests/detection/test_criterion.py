"""The criterion: recorded losses and gradients, several processes, masks, errors."""

import pytest
import torch
import torch.nn.functional as F

from detection import criterion as module
from detection.criterion import SetCriterion
from detection.matcher import HungarianMatcher, Matches, Objects
from scripts.benchmark.host_syncs import OperatorCounter
from tests.detection.synthetic import outputs, recorded, recorded_targets, targets
from tests.recipes import golden, golden_json

RECORDED = golden_json("matching")["criterion"]
BASIC = ("labels", "boxes", "cardinality")


def criterion(losses=BASIC, classes: int = 5, eos_coef: float = 0.1) -> SetCriterion:
    return SetCriterion(classes, HungarianMatcher(), {}, eos_coef, losses)


@pytest.mark.parametrize("eos_coef", [0.1, 1.0])
def test_recorded_losses_and_gradients(eos_coef):
    expected = RECORDED[f"eos{eos_coef}"]
    logits = recorded("crit/logits").requires_grad_()
    coordinates = recorded("crit/boxes").requires_grad_()
    layers = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, coordinates, strict=True)]
    loss_fn = criterion(classes=91, eos_coef=eos_coef)
    metrics = loss_fn(layers[-1] | {"aux_outputs": layers[:-1]}, recorded_targets("crit", 3))

    assert list(metrics) == list(expected["losses"])
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(expected["losses"], rel=1e-6, abs=1e-6)
    total = sum(weight * metrics[name] for name, weight in expected["weight_dict"].items())
    assert total.item() == pytest.approx(expected["total"], rel=1e-6)

    total.backward()
    for tensor, norms in ((logits, "gl_norm"), (coordinates, "gb_norm")):
        found = [gradient.norm().item() for gradient in tensor.grad]
        assert found == pytest.approx(expected[norms], rel=1e-5)
    if eos_coef == 0.1:
        torch.testing.assert_close(coordinates.grad, recorded("crit/grad_boxes"))
        torch.testing.assert_close(logits.grad[-1], recorded("crit/grad_logits_last"))


@pytest.mark.parametrize("tag", ["none", "rpe-2.0-product-ctx-1-k"])
def test_recorded_losses_of_whole_models(tag):
    """Recorded outputs with all objects, with objects in one of two images, and without objects."""
    arrays, facts = golden("detr"), golden_json("detr")
    parts = ("pred_logits", "pred_boxes", "aux_logits", "aux_boxes")
    logits, coordinates, aux_logits, aux_boxes = (
        torch.from_numpy(arrays[f"{tag}/B/{part}"]) for part in parts
    )
    aux = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(aux_logits, aux_boxes, strict=True)]
    made = {"pred_logits": logits, "pred_boxes": coordinates, "aux_outputs": aux}
    full = [{n: torch.tensor(v) for n, v in t.items()} for t in facts["inputs"]["targets"]]
    empty = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    loss_fn = criterion(classes=91)
    for suffix, wanted in {
        "": full,
        "_second_empty": [full[0], empty],
        "_all_empty": [empty, empty],
    }.items():
        found = {name: value.item() for name, value in loss_fn(made, wanted).items()}
        expected = facts["run"][f"{tag}/B"][f"losses{suffix}"]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    indices = facts["run"][f"{tag}/B"]["indices"]
    for layer, expected in zip([made, *aux], [indices["last"], *indices["aux"]], strict=True):
        assert [
            [side.tolist() for side in pair] for pair in loss_fn.matcher(layer, full)
        ] == expected


def test_the_recorded_giou_loss_and_its_gradient():
    a = recorded("giou/a_cxcywh")[:15].double().requires_grad_()
    b = recorded("giou/b_cxcywh").double()[:15]
    objects = Objects.of([{"labels": torch.zeros(15), "boxes": b}])
    matches = Matches(torch.arange(15)[None], torch.arange(15)[None])
    losses = criterion()._loss_boxes(a[None, None], objects, matches, torch.tensor(1.0))
    (loss,) = losses["loss_giou"]
    assert loss.item() == pytest.approx(golden_json("matching")["giou_diag_loss_sum"], abs=1e-12)
    loss.backward()
    torch.testing.assert_close(a.grad, recorded("giou/diag_loss_grad_f64"))


def test_every_layer_is_matched_separately():
    made, wanted = outputs(2, layers=2), targets(3, 2)
    together = criterion()(made, wanted)
    for i, layer in enumerate(made["aux_outputs"]):
        alone = criterion()(layer, wanted)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(together[f"{name}_{i}"], alone[name])
    assert [name for name in together if name.startswith("class_error")] == ["class_error"]


def test_a_batch_without_objects_trains_the_classes_and_not_the_boxes():
    made = outputs(2, layers=1)
    metrics = criterion()(made, targets(0, 0))
    assert metrics["loss_bbox"] == metrics["loss_giou"] == 0
    assert metrics["class_error"] == 100  # as published
    sum(metrics.values()).backward()
    assert made["pred_logits"].grad.abs().sum() > 0
    assert made["pred_boxes"].grad.abs().sum() == 0


def test_box_losses_are_divided_by_the_objects_per_process(monkeypatch):
    monkeypatch.setattr(module, "world_size", lambda: 4)
    monkeypatch.setattr(module, "all_reduce_sum", lambda count: count + 15)
    made, wanted, loss_fn = outputs(2), targets(3, 2), criterion()
    shared = loss_fn(made, wanted)
    alone = loss_fn.eval()(made, wanted)
    for name in ("loss_bbox", "loss_giou"):
        torch.testing.assert_close(shared[name] * (5 + 15) / 4, alone[name] * 5)
    torch.testing.assert_close(shared["loss_ce"], alone["loss_ce"])


def test_evaluation_mode_does_not_communicate(monkeypatch):
    monkeypatch.setattr(module, "all_reduce_sum", None)
    criterion().eval()(outputs(1), targets(2))


def test_less_than_one_object_per_process_counts_as_one(monkeypatch):
    monkeypatch.setattr(module, "world_size", lambda: 8)
    made, wanted = outputs(1), targets(1)
    torch.testing.assert_close(
        criterion()(made, wanted)["loss_bbox"], criterion().eval()(made, wanted)["loss_bbox"]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_half_precision_outputs_are_float32(dtype):
    made, wanted = outputs(2), targets(3, 2)
    halved = {name: value.to(dtype) for name, value in made.items()}
    with torch.autocast("cpu", torch.bfloat16):
        metrics = criterion()(halved, wanted)
    expected = criterion()({name: value.float() for name, value in halved.items()}, wanted)
    assert all(value.dtype == torch.float32 for value in metrics.values())
    torch.testing.assert_close(metrics, expected)


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_outputs_that_are_nan_give_losses_that_are_not_finite(name):
    made = outputs(2)
    with torch.no_grad():
        made[name][0] = float("nan")
    metrics = criterion()(made, targets(3, 2))
    bad = {key for key, value in metrics.items() if not value.isfinite()}
    assert bad == ({"loss_ce"} if name == "pred_logits" else {"loss_bbox", "loss_giou"})


@pytest.mark.parametrize("label", [-1, 5, 90])
def test_a_label_that_is_not_a_class_is_refused(label):
    wanted = targets(3, 2)
    wanted[1]["labels"][0] = label
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), .* got {label}"):
        criterion()(outputs(2), wanted)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=r"losses must be among labels, .* got 'keypoints'"):
        criterion(("labels", "keypoints"))


def test_the_criterion_has_no_state_dict():
    assert not criterion().state_dict()


def with_masks(*counts: int) -> tuple[dict, list[dict]]:
    """Return outputs at a quarter of the padded size 24×20, and targets of different sizes."""
    made = outputs(len(counts), layers=1)
    made["pred_masks"] = torch.randn(len(counts), 7, 6, 5, requires_grad=True)
    wanted = targets(*counts)
    for target, size in zip(wanted, [(24, 13), (17, 20), (9, 9)], strict=False):
        target["masks"] = torch.rand(len(target["labels"]), *size) > 0.5
    return made, wanted


def test_mask_losses_are_focal_and_dice_of_the_matched_pairs():
    made, wanted = with_masks(3, 2)
    loss_fn = criterion((*BASIC, "masks"))
    metrics = loss_fn(made, wanted)
    focal = dice = 0.0
    for i, (queries, objects) in enumerate(loss_fn.matcher(made, wanted)):
        for query, number in zip(queries, objects, strict=True):
            logits = F.interpolate(
                made["pred_masks"][i, query][None, None], (24, 20), None, "bilinear"
            )
            p = logits[0, 0].sigmoid()
            mask = torch.zeros(24, 20)
            height, width = wanted[i]["masks"].shape[1:]
            mask[:height, :width] = wanted[i]["masks"][number]
            hit = torch.where(mask > 0, p, 1 - p)
            alpha = torch.where(mask > 0, 0.25, 0.75)
            focal += (-alpha * (1 - hit) ** 2 * hit.log()).mean() / 5
            dice += (1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)) / 5
    torch.testing.assert_close(metrics["loss_mask"], focal)
    torch.testing.assert_close(metrics["loss_dice"], dice)
    assert [name for name in metrics if "mask" in name or "dice" in name] == [
        "loss_mask",
        "loss_dice",
    ]


def test_mask_losses_of_a_batch_without_objects_are_0():
    made, wanted = with_masks(0, 0)
    metrics = criterion((*BASIC, "masks"))(made, wanted)
    assert metrics["loss_mask"] == metrics["loss_dice"] == 0
    sum(metrics.values()).backward()
    assert made["pred_masks"].grad.abs().sum() == 0


def test_box_losses_of_perfect_predictions_are_0():
    wanted = targets(3)
    made = {"pred_logits": torch.randn(1, 3, 6), "pred_boxes": wanted[0]["boxes"].flip(0)[None]}
    metrics = SetCriterion(5, HungarianMatcher(0, 5, 2), {}, 0.1, BASIC)(made, wanted)
    assert metrics["loss_bbox"] == 0
    assert metrics["loss_giou"].abs() < 1e-6


def test_all_layers_need_few_operators_and_one_wait_for_the_device():
    made, wanted = outputs(2, layers=5), targets(3, 2)
    with OperatorCounter() as counter:
        criterion()(made, wanted)
    assert counter.operators <= 250
    assert counter.syncs == {"cpu": 1}


def test_the_number_of_operators_is_the_same_for_any_number_of_images_and_objects():
    found = set()
    for layers, counts in ((5, (3, 2)), (1, (3, 2)), (5, (1, 0, 7, 2, 3))):
        made, wanted = outputs(len(counts), layers=layers), targets(*counts)
        with OperatorCounter() as counter:
            criterion()(made, wanted)
        # Each auxiliary layer adds only the promotion of two data types.
        found.add(counter.operators - 2 * layers)
    assert len(found) == 1
