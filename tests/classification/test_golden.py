"""The published models equal values recorded from the original code (tests/golden)."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler

from classification.build import create_optimizer, scaled_lr
from classification.config import parse_args
from classification.models import PUBLISHED, build_model
from tests.recipes import fill, golden, golden_json, input_a, input_b, recipe_a

MODELS = golden_json("deit")
TRAIN = golden_json("deit_train")
NUMBERS = golden("deit")
IMAGES = input_b(2, 3, 224, 224).float()
TINY = "deit_tiny_patch16_224_ctx_product_50_shared_k"
RECIPE = ["--model", TINY, "--batch-size", "128"]


def max_error(tensor: torch.Tensor, key: str) -> float:
    return (tensor.detach() - torch.from_numpy(NUMBERS[key])).abs().max().item()


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_has_the_published_keys_shapes_and_order(name):
    expected = MODELS["models"][name]
    model = timm.create_model(name)
    keys = [
        [k, list(v.shape), str(v.dtype).removeprefix("torch.")]
        for k, v in model.state_dict().items()
    ]
    assert keys == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["n_params"]


@pytest.mark.usefixtures("implementation")
def test_tiny_logits_equal_the_original():
    with torch.no_grad():
        logits = fill(timm.create_model(TINY).eval())(IMAGES)
    assert max_error(logits, "tiny_product_50_k/B/logits") < 1e-5


@pytest.mark.usefixtures("implementation")
def test_tiny_logits_of_the_smooth_recipe_equal_the_original():
    with torch.no_grad():
        logits = fill(timm.create_model(TINY).eval(), recipe_a)(input_a(2, 3, 224, 224).float())
    assert max_error(logits, "tiny_product_50_k/A/logits") < 1e-5


@pytest.mark.usefixtures("implementation")
def test_small_qk_logits_equal_the_original():
    model = fill(timm.create_model("deit_small_patch16_224_ctx_product_50_shared_qk").eval())
    with torch.no_grad():
        logits = model(IMAGES)
    assert max_error(logits, "small_product_50_qk/B/logits") < 1e-5


def test_ten_class_head_equals_the_original():
    model = fill(timm.create_model(TINY, num_classes=10).eval())
    with torch.no_grad():
        logits = model(IMAGES)
    assert max_error(logits, "tiny_product_50_k/nc10/B/logits") < 1e-5


def test_without_rpe_logits_equal_the_original():
    model = build_model("deit_tiny_patch16_224", num_classes=1000, input_size=(224, 224))
    with torch.no_grad():
        logits = fill(model.eval())(IMAGES)
    assert max_error(logits, "tiny_norpe/B/logits") < 1e-5


@pytest.mark.usefixtures("implementation")
def test_gradients_equal_the_original():
    expected = MODELS["grads"]["tiny_product_50_k/B"]
    model = fill(timm.create_model(TINY).eval())
    loss = F.cross_entropy(model(IMAGES), torch.tensor([3, 7]))
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss_f64"], abs=1e-5)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(expected["norms_f64"])
    for name, norm in expected["norms_f64"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    for key in (key for key in NUMBERS.files if "/B/grad/" in key):
        assert max_error(parameters[key.split("/grad/")[1]].grad, key) < 1e-5, key


def test_logits_with_zeroed_tables_are_far_from_the_original():
    model = fill(timm.create_model(TINY).eval())
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        logits = model(IMAGES)
    assert max_error(logits, "tiny_product_50_k/B/logits") > 0.03


def test_initial_standard_deviations_equal_the_original():
    model = timm.create_model(TINY)
    for name, std in MODELS["init_std"].items():
        assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.25), name
    tables = [p for name, p in model.named_parameters() if "lookup_table" in name]
    assert len(tables) == 12
    assert all(not table.any() for table in tables)


def test_stochastic_depth_rises_as_in_the_original():
    model = timm.create_model(TINY, drop_path_rate=0.1)
    probabilities = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert probabilities == pytest.approx(MODELS["drop_path_probs"], abs=1e-6)


def test_weight_decay_groups_equal_the_original():
    expected = TRAIN["param_groups"]["tiny_product_50_k"]["groups"]
    model = timm.create_model(TINY)
    optimizer = create_optimizer(parse_args(RECIPE), model, total_batch_size=1024)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {"weight_decay": group["weight_decay"], "names": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    assert groups == [{"weight_decay": g["weight_decay"], "names": g["names"]} for g in expected]


def test_learning_rate_of_every_epoch_equals_the_original():
    config = parse_args(RECIPE)
    optimizer = create_optimizer(config, timm.create_model(TINY), total_batch_size=1024)
    scheduler, num_epochs = create_scheduler(config, optimizer)
    assert scaled_lr(config, 1024) == TRAIN["scaled_lr"]
    assert num_epochs == TRAIN["create_scheduler_num_epochs"]
    used = []
    for epoch in range(320):
        used.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step(epoch)
    expected = golden("deit_train")["lr/used_in_epoch"]
    np.testing.assert_allclose(used, expected, rtol=1e-9)


def test_options_of_deit_keep_their_names_and_defaults():
    # The original has a path of its authors, and its device is always a GPU.
    ours_differ = {"data_path", "device"}
    defaults = parse_args([]).model_dump()
    for name, value in TRAIN["args_default"].items():
        assert name in defaults, name
        if name not in ours_differ:
            assert defaults[name] == value, name
