"""The matcher: recorded assignments, lowest cost, and predictions that are not finite."""

import itertools

import pytest
import torch

from detection.boxes import cxcywh_to_xyxy, generalized_iou
from detection.matcher import HungarianMatcher, Objects
from tests.detection.synthetic import outputs, recorded, recorded_targets, targets
from tests.recipes import golden_json

CASES = golden_json("matching")["matcher"]


@pytest.mark.parametrize("weights", list(CASES["basic"]["indices"]))
@pytest.mark.parametrize("case", list(CASES))
def test_assignments_equal_the_recorded_ones(case, weights):
    made = {n: recorded(f"matcher/{case}/{n}") for n in ("pred_logits", "pred_boxes")}
    matcher = HungarianMatcher(*(int(part) for part in weights.strip("()").split(",")))
    matches = matcher(made, recorded_targets(f"matcher/{case}", len(CASES[case]["sizes"])))
    assert all(side.dtype == torch.int64 for match in matches for side in match)
    found = [[side.tolist() for side in match] for match in matches]
    assert found == CASES[case]["indices"][weights]


def test_assignments_of_a_layer_with_ties_equal_the_recorded_ones():
    made = {
        "pred_logits": recorded("crit/logits")[-1],
        "pred_boxes": recorded("crit/boxes")[-1],
    }
    matches = HungarianMatcher()(made, recorded_targets("crit", 3))
    found = [[side.tolist() for side in match] for match in matches]
    assert found == golden_json("matching")["criterion"]["eos0.1"]["indices_last"]


def test_no_other_assignment_costs_less():
    made, wanted = outputs(1, queries=5), targets(3)
    costs = {"cost_class": 1.5, "cost_bbox": 3.0, "cost_giou": 0.7}
    probability = made["pred_logits"][0].softmax(-1)
    distance = (made["pred_boxes"][0][:, None] - wanted[0]["boxes"]).abs().sum(-1)
    overlap = generalized_iou(
        cxcywh_to_xyxy(made["pred_boxes"][0])[:, None], cxcywh_to_xyxy(wanted[0]["boxes"])
    )
    cost = 3.0 * distance - 1.5 * probability[:, wanted[0]["labels"]] - 0.7 * overlap
    cheapest = min(
        cost[list(queries), range(3)].sum() for queries in itertools.permutations(range(5), 3)
    )
    queries, objects = HungarianMatcher(**costs)(made, wanted)[0]
    assert queries.tolist() == sorted(queries.tolist())
    torch.testing.assert_close(cost[queries, objects].sum(), cheapest)


def test_more_objects_than_queries_leaves_some_unmatched():
    queries, objects = HungarianMatcher()(outputs(1, queries=3), targets(8))[0]
    assert queries.tolist() == [0, 1, 2]
    assert len(set(objects.tolist())) == 3


def test_a_batch_without_any_object_matches_nothing():
    matches = HungarianMatcher()(outputs(2), targets(0, 0))
    assert [len(side) for match in matches for side in match] == [0, 0, 0, 0]


def test_an_image_is_matched_the_same_in_any_batch():
    made, wanted = outputs(3), targets(4, 2, 5)
    together = HungarianMatcher()(made, wanted)
    for i, match in enumerate(together):
        alone = HungarianMatcher()({n: v[i : i + 1] for n, v in made.items()}, wanted[i : i + 1])
        assert all(torch.equal(a, b) for a, b in zip(match, alone[0], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_predictions_that_are_not_finite_are_matched_too(name, value):
    made, wanted = outputs(2), targets(3, 2)
    with torch.no_grad():
        made[name][0] = value
        made[name][1, 0] = value
    matches = HungarianMatcher()(made, wanted)
    assert [len(match[0]) for match in matches] == [3, 2]
    assert 0 not in matches[1][0]


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("boxes", r"boxes must have a width and a height of at least 0, got \[.*, -0.5, "),
        ("pred_boxes", "pred_boxes must have no negative width or height, got -0.5"),
    ],
)
def test_a_negative_width_is_refused(side, message):
    made, wanted = outputs(2), targets(2, 1)
    changed = {"boxes": wanted[0]["boxes"][1], "pred_boxes": made["pred_boxes"].detach()[1, 3]}
    changed[side][2] = -0.5
    with pytest.raises(ValueError, match=message):
        HungarianMatcher()(made, wanted)


def test_layers_matched_together_have_the_matches_of_each_alone():
    made, wanted = outputs(3, layers=2), targets(4, 0, 9)
    layers = [made, *made["aux_outputs"]]
    logits, coordinates = (
        torch.stack([layer[name] for layer in layers]) for name in ("pred_logits", "pred_boxes")
    )
    queries, objects = HungarianMatcher().match(logits, coordinates, Objects.of(wanted))
    assert queries.shape == objects.shape == (3, 4 + 0 + 7)
    for number, layer in enumerate(layers):
        alone = HungarianMatcher()(layer, wanted)
        expected = [(3 * number + image) * 7 + i for image, (i, _) in enumerate(alone)]
        assert torch.equal(queries[number], torch.cat(expected))
        expected = [first + j for first, (_, j) in zip((0, 4, 4), alone, strict=True)]
        assert torch.equal(objects[number], torch.cat(expected))


def test_costs_that_are_all_0_are_refused():
    with pytest.raises(ValueError, match="cost_class, cost_bbox and cost_giou must not all be 0"):
        HungarianMatcher(0, 0, 0)
