"""Boxes: recorded conversions and values of GIoU."""

import pytest
import torch

from detection.boxes import cxcywh_to_xyxy, generalized_iou, xyxy_to_cxcywh
from tests.recipes import golden

DTYPES = {"f32": torch.float32, "f64": torch.float64}


def recorded(name: str) -> torch.Tensor:
    return torch.from_numpy(golden("matching")[f"giou/{name}"])


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_recorded_conversions_and_giou(dtype):
    corners = []
    for side in "ab":
        boxes = recorded(f"{side}_cxcywh").to(DTYPES[dtype])
        corners.append(cxcywh_to_xyxy(boxes))
        torch.testing.assert_close(corners[-1], recorded(f"{dtype}/{side}_xyxy"))
    torch.testing.assert_close(xyxy_to_cxcywh(corners[0]), recorded(f"{dtype}/a_back_cxcywh"))
    pairs = generalized_iou(corners[0][:, None], corners[1])
    torch.testing.assert_close(pairs, recorded(f"{dtype}/giou"))


def test_boxes_without_area_have_the_recorded_giou_and_nan():
    boxes = recorded("special_xyxy")
    giou = generalized_iou(boxes[:, None], boxes)
    expected = recorded("special_giou")
    assert expected.isnan().sum() == 9
    torch.testing.assert_close(giou, expected, equal_nan=True)


def test_no_boxes_give_an_empty_matrix():
    assert generalized_iou(torch.zeros(0, 1, 4), torch.rand(3, 4).cumsum(1)).shape == (0, 3)
