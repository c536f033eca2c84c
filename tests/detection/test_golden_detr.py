"""DETR equals values recorded from the original code (tests/golden)."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from detection.build import build_model, build_network
from detection.config import parse_args
from detection.detr import Encoded
from detection.position_encoding import build_position_encoding
from tests.detection.models import config, images_of, network
from tests.recipes import golden, golden_json

FACTS = golden_json("detr")
NUMBERS = golden("detr")
RPE = "rpe-2.0-product-ctx-1-k"
CONFIGS = {"none": ""}
CONFIGS |= {spec: f"--enc_rpe2d {spec}" for spec in (RPE, "rpe-1.9-product-ctx-1-k")}
recorded_runs = pytest.mark.parametrize("tag", ["none", RPE])


def max_error(actual: Tensor, key: str) -> float:
    return (actual - torch.from_numpy(NUMBERS[key])).abs().max().item()


@cache
def run(tag: str) -> tuple[dict, Encoded]:
    """Return the outputs for the recorded images, and the results before the heads."""
    detr = network(CONFIGS[tag])
    with torch.no_grad():
        encoded = detr.encode(*images_of(*((h, w) for _, h, w in FACTS["inputs"]["image_shapes"])))
        return detr.predict(encoded.objects), encoded


@pytest.mark.parametrize("tag", CONFIGS)
def test_state_dict_losses_and_initial_tables_equal_the_original(tag):
    expected = FACTS["configs"][tag]
    detr, criterion, postprocessors = build_model(config(CONFIGS[tag]))
    keys = [
        [k, list(v.shape), str(v.dtype).removeprefix("torch.")]
        for k, v in detr.state_dict().items()
    ]
    assert keys == expected["state_dict"]
    assert sum(p.numel() for p in detr.parameters()) == expected["n_params"]
    assert criterion.weight_dict == expected["weight_dict"]
    assert list(criterion.losses) == expected["losses"]
    assert list(postprocessors) == ["bbox"]
    for name, spread in expected["table_init"].items():
        table = detr.get_parameter(name)
        assert 0.95 * spread["xavier_bound"] < table.abs().max() <= spread["xavier_bound"]
        assert table.std().item() == pytest.approx(spread["std"], rel=0.05)


def test_trained_and_frozen_parameters_equal_the_original():
    # The frozen stages do not depend on whether the ImageNet weights are loaded.
    detr = build_network(parse_args([]), load=False)
    names = {True: [], False: []}
    for name, parameter in detr.named_parameters():
        names[parameter.requires_grad].append(name)
    assert names[True] == FACTS["param_names_requires_grad"]
    assert names[False] == FACTS["param_names_frozen"]
    trained = sum(p.numel() for p in detr.parameters() if p.requires_grad)
    assert trained == FACTS["configs"]["none"]["n_params_requires_grad"]


@recorded_runs
@pytest.mark.usefixtures("implementation")
def test_outputs_of_every_layer_equal_the_original(tag):
    outputs, encoded = run(tag)
    prefix = f"{tag}/B"
    assert max_error(outputs["pred_logits"], f"{prefix}/pred_logits") < 2e-5
    assert max_error(outputs["pred_boxes"], f"{prefix}/pred_boxes") < 2e-6
    for name in ("logits", "boxes"):
        layers = torch.stack([layer[f"pred_{name}"] for layer in outputs["aux_outputs"]])
        assert max_error(layers, f"{prefix}/aux_{name}") < 2e-5
    assert max_error(encoded.memory, f"{prefix}/memory") < 5e-5
    assert max_error(encoded.objects[-1, :, ::10], f"{prefix}/hs_last_slice") < 5e-5


def test_backbone_projection_mask_and_positions_equal_the_original():
    _, encoded = run("none")
    assert max_error(encoded.levels[-1][:, ::64], "none/B/backbone_slice") < 1e-4
    assert max_error(encoded.projected, "none/B/input_proj") < 1e-4
    np.testing.assert_array_equal(encoded.mask.numpy(), NUMBERS["mask_feat"])
    encode_positions = build_position_encoding("sine", 256)
    assert max_error(encode_positions(encoded.mask), "pos_embed") < 1e-5


@recorded_runs
@pytest.mark.usefixtures("implementation")
def test_losses_and_detections_equal_the_original(tag):
    outputs, _ = run(tag)
    facts = FACTS["run"][f"{tag}/B"]
    _, criterion, postprocessors = build_model(config(CONFIGS[tag]))
    criterion.eval()
    targets = [
        {"labels": torch.tensor(t["labels"]), "boxes": torch.tensor(t["boxes"]).reshape(-1, 4)}
        for t in FACTS["inputs"]["targets"]
    ]
    losses = criterion(outputs, targets)
    assert set(losses) == set(facts["losses"])
    for name, value in facts["losses"].items():
        assert losses[name].item() == pytest.approx(value, abs=1e-4), name
    total = sum(losses[name] * weight for name, weight in criterion.weight_dict.items())
    assert total.item() == pytest.approx(facts["total"], abs=1e-4)
    sizes = torch.tensor(FACTS["inputs"]["orig_sizes"])
    for i, detections in enumerate(postprocessors["bbox"](outputs, sizes)):
        assert max_error(detections["scores"], f"{tag}/B/post{i}/scores") < 1e-5
        assert max_error(detections["boxes"], f"{tag}/B/post{i}/boxes") < 2e-3
        assert max_error(detections["labels"], f"{tag}/B/post{i}/labels") == 0


def test_logits_with_zeroed_tables_are_as_far_from_the_original_as_recorded():
    detr = network(CONFIGS[RPE])
    for name, parameter in detr.named_parameters():
        if "lookup_table" in name:
            torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        outputs = detr(*images_of((200, 304), (256, 192)))
    expected = FACTS["run"][f"{RPE}/B"]["zero_tables_maxdiff"]["logits"]
    difference = max_error(outputs["pred_logits"], f"{RPE}/B/pred_logits")
    assert difference == pytest.approx(expected, abs=1e-4)


def test_options_of_detr_keep_their_names_and_defaults():
    # The device of the original is always a GPU.
    defaults = parse_args([]).model_dump()
    for name, value in FACTS["args_default"].items():
        assert name in defaults, name
        if name != "device":
            assert defaults[name] == value, name
