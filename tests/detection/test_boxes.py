"""Boxes: recorded conversions and values of GIoU, and reversed corners."""

import pytest
import torch

from detection.boxes import cxcywh_to_xyxy, pairwise_giou, xyxy_to_cxcywh
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
    torch.testing.assert_close(pairwise_giou(*corners), recorded(f"{dtype}/giou"))


def test_boxes_without_area_have_the_recorded_giou_and_nan():
    boxes = recorded("special_xyxy")
    giou = pairwise_giou(boxes, boxes)
    expected = recorded("special_giou")
    assert expected.isnan().sum() == 9
    torch.testing.assert_close(giou, expected, equal_nan=True)


@pytest.mark.parametrize("position", [0, 1], ids=["first", "second"])
def test_reversed_corners_are_refused_with_name_and_index(position):
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.2, 0.5, 0.4]]) for _ in range(2)]
    boxes[position][1] = torch.tensor([0.5, 0.25, 0.25, 0.75])
    message = rf"boxes{position + 1}\[1\] must be .*x1 <= x2.* got \[0.5, 0.25, 0.25, 0.75\]"
    with pytest.raises(ValueError, match=message):
        pairwise_giou(*boxes)


def test_no_boxes_give_an_empty_matrix():
    assert pairwise_giou(torch.zeros(0, 4), torch.rand(3, 4).cumsum(1)).shape == (0, 3)
