"""The COCO evaluator: known metrics, several processes, orders, odd annotations."""

import copy
import io
import json
import logging
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection import coco_scoring
from detection.coco_detections import CocoDetections
from detection.coco_eval import METRICS, CocoEvaluator, format_metrics
from tests.detection.threads import as_processes

SIDE = 200


@pytest.fixture(autouse=True, params=["pycocotools", "hotcoco"])
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate with each library, whether or not the other is installed."""
    pytest.importorskip(request.param)
    monkeypatch.setattr(coco_scoring, "is_installed", lambda name: name == request.param)


def coco(annotations: list[dict], images: int = 3, categories: tuple[int, ...] = (3, 7)) -> COCO:
    """Return annotations of images 10, 20, …, with only the given fields."""
    made = COCO()
    made.dataset = {
        "images": [
            {"id": 10 * (i + 1), "width": SIDE, "height": SIDE, "file_name": f"{i}.jpg"}
            for i in range(images)
        ],
        "categories": [{"id": c, "name": str(c)} for c in categories],
        "annotations": annotations,
    }
    with redirect_stdout(io.StringIO()):
        made.createIndex()
    return made


def annotation(number: int, image: int, category: int, box: list[float], **more) -> dict:
    """Return an object with its box (x, y, w, h), which is also its polygon."""
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": box, "area": w * h,
        "iscrowd": 0, "segmentation": [polygon], **more,
    }  # fmt: skip


def detections(*rows: tuple[int, float, list[float]]) -> dict[str, torch.Tensor]:
    """Return detections from rows of label, score and box (x, y, w, h); the mask fills the box."""
    boxes = torch.tensor([row[2] for row in rows]).view(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    masks = torch.zeros(len(rows), SIDE, SIDE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, corners.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    return {
        "scores": torch.tensor([row[1] for row in rows]),
        "labels": torch.tensor([row[0] for row in rows], dtype=torch.int64),
        "boxes": corners,
        "masks": masks,
    }


# pycocotools adds a small number to its divisors.
ALL_FOUND = pytest.approx(dict.fromkeys(METRICS, 1.0))
SMALL, MEDIUM, LARGE = [5.0, 5, 20, 20], [40.0, 40, 60, 60], [50.0, 60, 120, 120]
OBJECTS = [
    annotation(1, 10, 3, SMALL),
    annotation(2, 10, 7, LARGE),
    annotation(3, 20, 3, MEDIUM),
]
RIGHT = {
    10: detections((3, 0.9, SMALL), (7, 0.8, LARGE)),
    20: detections((3, 0.7, MEDIUM)),
    30: detections(),
}


def evaluate(truth: COCO, predictions: dict, *iou_types: str, **options) -> dict:
    evaluator = CocoEvaluator(truth, iou_types or ("bbox",), **options)
    evaluator.update(predictions)
    return evaluator.metrics()


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_perfect_detections_score_1(iou_type):
    metrics = evaluate(coco(OBJECTS), RIGHT, iou_type)
    assert list(metrics) == [iou_type]
    assert metrics[iou_type] == ALL_FOUND


def test_missed_displaced_and_misclassified_objects_have_the_expected_metrics():
    found = {
        # The small object has an IoU of 15·20 / 500 = 0.6; the large one has the wrong class.
        10: detections((3, 0.9, [10.0, 5, 20, 20]), (3, 0.8, LARGE)),
        20: detections((3, 0.7, MEDIUM)),
        30: detections(),
    }
    metrics = evaluate(coco(OBJECTS), found)["bbox"]
    # Category 7 is never found. Category 3 has a match, a false positive and, up to an IoU of 0.6,
    # another match.
    thirds = (51 * 1 + 50 * 2 / 3) / 101
    assert metrics["AP50"] == pytest.approx(thirds / 2)
    # Above 0.6 only the medium object is found, as the third detection; the recall is 0.5.
    assert metrics["AP75"] == pytest.approx(51 / 101 / 3 / 2)
    assert metrics["AP"] == pytest.approx((3 * thirds + 7 * 51 / 101 / 3) / 10 / 2)
    assert metrics["AR100"] == pytest.approx((3 * 1.0 + 7 * 0.5) / 10 / 2)
    assert (metrics["APl"], metrics["APm"]) == (0, pytest.approx(1))


@pytest.mark.parametrize("has_segmentation", [True, False])
def test_a_crowd_counts_neither_as_missed_nor_its_detections_as_false(has_segmentation):
    # The lower right quarter, as run lengths of columns.
    rle = {"size": [SIDE, SIDE], "counts": [20100, *[100, 100] * 99, 100]}
    many = annotation(9, 20, 3, [100.0, 100, 100, 100], iscrowd=1, segmentation=rle)
    if not has_segmentation:
        del many["segmentation"]
    inside = detections((3, 0.99, [110.0, 110, 20, 20]), (3, 0.98, [150.0, 150, 30, 30]))
    medium = detections((3, 0.7, MEDIUM))
    both = {name: torch.cat([inside[name], medium[name]]) for name in inside}
    for iou_type in ("bbox", "segm"):
        metrics = evaluate(coco([*OBJECTS, many]), RIGHT | {20: both}, iou_type)[iou_type]
        assert metrics["AP"] == metrics["AR100"] == 1


def test_metrics_of_absent_sizes_are_minus_1_and_false_positives_count():
    metrics = evaluate(coco(OBJECTS[:1]), RIGHT)["bbox"]
    assert metrics["APs"] == pytest.approx(1)
    assert {metrics[name] for name in ("APm", "APl", "ARm", "ARl")} == {-1}
    false_positive = detections((3, 0.99, SMALL))
    assert evaluate(coco(OBJECTS), RIGHT | {30: false_positive})["bbox"]["AP"] < 1


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_no_detections_at_all_score_0(iou_type):
    nothing = dict.fromkeys((10, 20, 30), detections())
    metrics = evaluate(coco(OBJECTS), nothing, iou_type)[iou_type]
    assert metrics == dict.fromkeys(METRICS, 0.0)


def random_case(seed: int = 0, images: int = 12) -> tuple[COCO, dict]:
    """Return objects, and detections near them with random labels and often equal scores."""
    random = np.random.RandomState(seed)
    objects, predictions = [], {}
    for i in range(images):
        boxes = [[*random.randint(0, 90, 2), *random.randint(10, 110, 2)] for _ in range(i % 5)]
        boxes = [[float(x) for x in box] for box in boxes]
        for box in boxes:
            number = len(objects) + 1
            objects.append(annotation(number, 10 * (i + 1), int(random.choice([3, 7])), box))
        near = [[max(0.0, x + float(random.randint(-9, 9))) for x in b] for b in boxes * 2]
        predictions[10 * (i + 1)] = detections(
            *((int(random.choice([3, 7])), float(random.randint(5)) / 5, box) for box in near)
        )
    return coco(objects, images), predictions


def test_metrics_equal_those_of_pycocotools(tmp_path):
    truth, predictions = random_case()
    rows = []
    for image_id, found in predictions.items():
        columns = zip(found["labels"], found["scores"], found["boxes"].tolist(), strict=True)
        for label, score, (x1, y1, x2, y2) in columns:
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = {"image_id": image_id, "category_id": int(label), "score": float(score)}
            rows.append(entry | {"bbox": box})
    (tmp_path / "results.json").write_text(json.dumps(rows))
    with redirect_stdout(io.StringIO()):
        by_hand = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        by_hand.evaluate()
        by_hand.accumulate()
        by_hand.summarize()
    expected = dict(zip(METRICS, by_hand.stats.tolist(), strict=True))
    assert evaluate(truth, predictions)["bbox"] == expected
    assert 0.1 < expected["AP"] < 0.9


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_metrics_of_a_category_are_those_of_pycocotools_for_it_alone(iou_type):
    truth, predictions = random_case(images=20)
    truth.dataset["categories"].append({"id": 9, "name": "absent"})
    truth.createIndex()
    evaluator = CocoEvaluator(truth, (iou_type,))
    evaluator.update(predictions)
    metrics = evaluator.metrics()[iou_type]
    rows = evaluator.per_class[iou_type]
    assert [(row["class"], row["category_id"]) for row in rows] == [
        ("3", 3),
        ("7", 7),
        ("absent", 9),
    ]
    results = []
    for image_id, found in predictions.items():
        columns = (found[name] for name in ("labels", "scores", "boxes", "masks"))
        for label, score, box, mask in zip(*columns, strict=True):
            x1, y1, x2, y2 = box.tolist()
            entry = {"image_id": image_id, "category_id": int(label), "score": float(score)}
            if iou_type == "bbox":
                results.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
            else:
                rle = coco_masks.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
                results.append(entry | {"segmentation": rle})
    for row in rows:
        with redirect_stdout(io.StringIO()):
            alone = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), iou_type)
            alone.params.catIds = [row["category_id"]]
            alone.evaluate()
            alone.accumulate()
            alone.summarize()
        expected = dict(zip(METRICS, alone.stats.tolist(), strict=True))
        for name in ("AP", "AP50", "AR100"):
            assert row[name] == pytest.approx(expected[name], abs=1e-12)
        assert row["objects"] == len(truth.getAnnIds(catIds=[row["category_id"]]))
    assert rows[2] == {
        "class": "absent", "category_id": 9, "objects": 0, "AP": -1, "AP50": -1, "AR100": -1
    }  # fmt: skip
    assert metrics["AP"] == pytest.approx((rows[0]["AP"] + rows[1]["AP"]) / 2)
    assert 0.1 < rows[0]["AP"] < 0.9
    json.dumps(rows)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_both_libraries_have_equal_metrics(seed, iou_type):
    pytest.importorskip("hotcoco")
    truth, predictions = random_case(seed, images=30)
    # Run lengths, areas that are not those of the boxes, and objects that are not evaluated.
    crowd = {"size": [SIDE, SIDE], "counts": [4040, *[60, 140] * 59, 24160]}
    truth.dataset["annotations"] += [
        annotation(900, 20, 3, [20.0, 40, 60, 60], iscrowd=1, segmentation=crowd),
        annotation(901, 30, 7, [50.0, 50, 60.5, 40.5], area=900.0),
        annotation(902, 999, 7, MEDIUM),
        annotation(903, 40, 99, MEDIUM),
    ]
    truth.createIndex()
    predictions[20]["masks"][0, :50] = True
    predictions.pop(60)
    results = []
    for library in ("pycocotools", "hotcoco"):
        evaluator = CocoEvaluator(truth, (iou_type,), library=library)
        evaluator.update(predictions)
        results.append((evaluator.metrics()[iou_type], evaluator.per_class[iou_type]))
    (expected, by_class), (metrics, other_by_class) = results
    assert metrics == pytest.approx(expected, abs=1e-9, rel=0)
    assert 0.1 < metrics["AP"] < 0.9
    assert by_class == other_by_class


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_precision_of_both_libraries_is_equal_everywhere(iou_type):
    pytest.importorskip("hotcoco")
    truth, predictions = random_case(7, images=25)
    found = CocoDetections.join(
        [CocoDetections.of_image(i, p, None, iou_type == "segm") for i, p in predictions.items()]
    )
    one, other = (
        coco_scoring.create_scorer(truth, (iou_type,), library).score(found, iou_type)
        for library in ("pycocotools", "hotcoco")
    )
    assert np.array_equal(one.precision, other.precision)
    assert np.array_equal(one.recall, other.recall)


def test_the_log_has_the_library(caplog, request):
    library = request.node.callspec.params["_library"]
    with caplog.at_level(logging.INFO):
        evaluator = CocoEvaluator(coco(OBJECTS))
        for _ in range(2):
            evaluator.update(RIGHT)
            evaluator.metrics()
    assert caplog.text.count(f"COCO metrics by {library} ") == 1
    assert ("`pip install hotcoco` is faster" in caplog.text) == (library == "pycocotools")


def test_images_without_size_have_metrics_of_boxes():
    truth = coco(OBJECTS)
    for image in truth.dataset["images"]:
        del image["width"], image["height"], image["file_name"]
    assert evaluate(truth, RIGHT)["bbox"] == ALL_FOUND


def test_detections_of_several_parts_are_sorted_and_the_first_of_an_image_is_used():
    def part(*images: int) -> CocoDetections:
        found = {i: {**RIGHT[i], "scores": RIGHT[i]["scores"] / images[0]} for i in images}
        parts = [CocoDetections.of_image(i, p, None, True) for i, p in found.items()]
        return CocoDetections.join(parts)

    joined = CocoDetections.join([part(30, 20), part(20, 10)])
    assert joined.image_ids.tolist() == [10, 20, 30]
    assert joined.counts.tolist() == [2, 1, 0]
    assert joined.categories.tolist() == [3, 7, 3]
    assert joined.scores.tolist() == pytest.approx([0.9 / 20, 0.8 / 20, 0.7 / 30])
    assert joined.boxes.tolist() == [SMALL, LARGE, MEDIUM]
    assert joined.image_of_detection().tolist() == [10, 10, 20]
    assert coco_masks.toBbox(joined.masks.to_rle()).tolist() == [SMALL, LARGE, MEDIUM]


def test_crowds_are_not_counted_as_objects():
    evaluator = CocoEvaluator(coco([*OBJECTS, annotation(9, 20, 3, LARGE, iscrowd=1)]))
    evaluator.update(RIGHT)
    evaluator.metrics()
    assert [row["objects"] for row in evaluator.per_class["bbox"]] == [2, 1]


@pytest.mark.parametrize("count", [2, 3, 13], ids=lambda n: f"{n} processes")
def test_metrics_do_not_depend_on_processes_and_order(monkeypatch, count):
    truth, predictions = random_case()
    single = CocoEvaluator(truth, ("bbox", "segm"))
    single.update(predictions)
    alone = single.metrics()
    order = np.random.RandomState(1).permutation(list(predictions)).tolist()
    evaluators = [CocoEvaluator(truth, ("bbox", "segm")) for _ in range(count)]
    for rank, evaluator in enumerate(evaluators):
        evaluator.update({i: predictions[i] for i in order[rank::count]})
    evaluators[-1].update({order[0]: predictions[order[0]]})  # a repeated image
    metrics = as_processes(monkeypatch, count, lambda rank: evaluators[rank].metrics())
    assert metrics == [alone] * count
    assert [evaluator.per_class for evaluator in evaluators] == [single.per_class] * count


def test_a_repeated_image_counts_once():
    evaluator = CocoEvaluator(coco(OBJECTS))
    evaluator.update(RIGHT)
    evaluator.update({10: detections((7, 0.99, MEDIUM))})
    assert evaluator.metrics()["bbox"]["AP"] == 1


def test_reset_removes_the_detections_and_metrics_does_not():
    evaluator = CocoEvaluator(coco(OBJECTS), ("bbox", "segm"))
    evaluator.update(RIGHT)
    assert evaluator.metrics() == evaluator.metrics()
    evaluator.reset()
    evaluator.update(dict.fromkeys((10, 20, 30), detections()))
    assert evaluator.metrics()["segm"]["AP"] == 0


def test_missing_images_are_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        metrics = evaluate(coco(OBJECTS), {20: RIGHT[20]})["bbox"]
    assert metrics["AP"] == pytest.approx(1)
    assert "evaluated 1 of the 3 annotated images" in caplog.text
    caplog.clear()
    evaluate(coco(OBJECTS), {20: RIGHT[20]}, partial=True)
    assert caplog.text == ""


def test_labels_are_mapped_to_categories_and_unknown_ones_dropped():
    relabeled = {
        image_id: found | {"labels": (found["labels"] == 7).long()}
        for image_id, found in RIGHT.items()
    }
    relabeled[30] = detections((4, 0.99, SMALL))
    metrics = evaluate(coco(OBJECTS), relabeled, "bbox", "segm", label_to_category={0: 3, 1: 7})
    assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == 1


def test_areas_that_are_no_numbers_are_those_of_the_boxes_and_names_may_be_numbers():
    truth = coco([entry | {"area": None} for entry in OBJECTS])
    truth.dataset["categories"][0]["name"] = 3
    assert evaluate(truth, RIGHT)["bbox"] == ALL_FOUND


@pytest.mark.parametrize("missing", ["area", "iscrowd"])
def test_area_and_iscrowd_have_defaults(missing):
    bare = [{k: v for k, v in entry.items() if k != missing} for entry in OBJECTS]
    assert evaluate(coco(bare), RIGHT)["bbox"] == ALL_FOUND


@pytest.mark.parametrize("numbers", [(0, 1, 2), (5, 5, 5)], ids=["from 0", "all the same"])
def test_ids_of_annotations_have_no_effect(numbers):
    odd = [entry | {"id": number} for entry, number in zip(OBJECTS, numbers, strict=True)]
    assert evaluate(coco(odd), RIGHT)["bbox"]["AP"] == 1


def test_the_given_annotations_are_not_changed():
    truth = coco(copy.deepcopy(OBJECTS))
    evaluate(truth, RIGHT, "bbox", "segm")
    assert truth.dataset["annotations"] == OBJECTS


def test_nothing_is_printed(capsys):
    evaluate(coco(OBJECTS), RIGHT, "bbox", "segm")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["boxes", "scores"])
def test_detections_that_are_not_finite_match_nothing(name, value):
    """pycocotools itself counts a box of nan as a match of every object."""
    broken = {image_id: dict(found) for image_id, found in RIGHT.items()}
    for found in broken.values():
        found[name] = torch.full_like(found[name], value)
    assert evaluate(coco(OBJECTS), broken)["bbox"]["AP"] == 0


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="iou_types must be among bbox and segm, got 'keypoints'"):
        CocoEvaluator(coco(OBJECTS), ("bbox", "keypoints"))
    with pytest.raises(ValueError, match="library must be auto, hotcoco or pycocotools, got 'x'"):
        evaluate(coco(OBJECTS), RIGHT, library="x")
    with pytest.raises(ValueError, match="image_id must be in the annotations, got 11"):
        CocoEvaluator(coco(OBJECTS)).update({11: RIGHT[10]})
    boxes_only = {k: v for k, v in RIGHT[10].items() if k != "masks"}
    with pytest.raises(ValueError, match="predictions must have masks for iou_types segm, got"):
        CocoEvaluator(coco(OBJECTS), ("segm",)).update({10: boxes_only})
    with pytest.raises(ValueError, match="there are no images to evaluate"):
        CocoEvaluator(coco(OBJECTS)).metrics()


def test_the_twelve_metrics_are_formatted_in_two_lines():
    text = format_metrics(dict(zip(METRICS, range(12), strict=True)))
    assert text.splitlines()[0].startswith("AP 0.0000  AP50 1.0000  AP75 2.0000")
    assert text.splitlines()[1].endswith("ARm 10.0000  ARl 11.0000")


def test_each_model_and_iou_type_has_its_table():
    prefixes = {"": "boxes", "segm_": "masks", "ema_": "boxes, EMA", "ema_segm_": "masks, EMA"}
    metrics = {f"{prefix}{name}": i for i, prefix in enumerate(prefixes) for name in METRICS}
    lines = format_metrics({"loss": 3.0} | metrics).splitlines()
    assert lines[::3] == list(prefixes.values())
    assert [line.split("  ")[0] for line in lines[1::3]] == [f"AP {i}.0000" for i in range(4)]
