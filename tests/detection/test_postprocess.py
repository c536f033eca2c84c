"""Post-processing: recorded detections, masks at the size of the original image."""

import pytest
import torch

from detection.postprocess import PostProcess, PostProcessSegm
from tests.detection.synthetic import outputs, recorded
from tests.recipes import golden_json


def test_recorded_detections():
    made = {"pred_logits": recorded("crit/logits")[-1], "pred_boxes": recorded("crit/boxes")[-1]}
    sizes = torch.tensor(golden_json("matching")["post_orig_sizes"])
    first = PostProcess()(made, sizes)[0]
    torch.testing.assert_close(first["scores"], recorded("post/0/scores"))
    torch.testing.assert_close(first["boxes"], recorded("post/0/boxes"))
    assert torch.equal(first["labels"], recorded("post/0/labels"))


def test_no_object_is_never_detected():
    made = outputs(1)
    with torch.no_grad():
        made["pred_logits"][..., -1] = 50
    found = PostProcess()(made, torch.tensor([[10, 20]]))[0]
    assert found["labels"].max() < 5
    assert found["scores"].max() < 1e-6


@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 2), (2, 3)], ids=str)
def test_sizes_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"sizes must have the shape \(2, 2\), .* got"):
        PostProcess()(outputs(2), torch.ones(shape))


def test_a_mask_has_the_original_size_without_padding():
    logits = torch.full((2, 40, 6, 8), -9.0)
    logits[0, 35, :, :4] = 9  # the left half of the padded image, 24 × 32
    logits[1, 2, 3:, :] = 9  # the lower half
    sizes = torch.tensor([[24, 20], [16, 32]])
    originals = torch.tensor([[48, 40], [8, 16]])
    results = [{"scores": torch.rand(40)} for _ in range(2)]
    found = PostProcessSegm()(results, {"pred_masks": logits}, originals, sizes)
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(found, results, strict=True))
    first, second = (result["masks"] for result in found)
    assert first.dtype == torch.bool
    expected = torch.zeros(40, 48, 40, dtype=torch.bool)
    expected[35, :, :32] = True
    assert torch.equal(first, expected)
    expected = torch.zeros(40, 8, 16, dtype=torch.bool)
    expected[2, 6:] = True
    assert torch.equal(second, expected)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_the_threshold_is_a_probability(threshold):
    probability = torch.tensor([0.1, 0.3, 0.7, 0.95])
    logits = probability.logit().view(1, 4, 1, 1)
    sizes = torch.tensor([[1, 1]])
    found = PostProcessSegm(threshold)([{}], {"pred_masks": logits}, sizes, sizes)
    assert torch.equal(found[0]["masks"].flatten(), probability > threshold)


@pytest.mark.parametrize("threshold", [0, 1, -0.5])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match=rf"threshold must be in \(0, 1\), got {threshold}"):
        PostProcessSegm(threshold)
