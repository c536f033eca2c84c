"""Options for fine-tuning and for little memory: layer decay, EMA warm-up, checkpointing."""

import pytest
import torch
from timm.scheduler import create_scheduler

from classification.build import create_model, create_optimizer
from classification.config import parse_args
from classification.main import main
from engine.summary import describe_training
from tests.classification.conftest import weights

SMALL = (
    "--model deit_tiny_patch16_224 --rpe rpe-1.9-product-ctx-1-qkv --input_size 16 --patch_size 4 "
    "--embed_dim 32 --depth 3 --num_heads 2 --no-scale_lr --lr 1e-3 --warmup_epochs 0"
)


def optimizer_of(*flags: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    config = parse_args([*SMALL.split(), *flags])
    model = create_model(config, 10)
    optimizer = create_optimizer(config, model, 64)
    create_scheduler(config, optimizer)
    return model, optimizer


def options_of(model, optimizer, option: str) -> dict[str, float]:
    """Return an option of the parameter groups by the name of the parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group[option] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("flags", [[], ["--distillation_token"]], ids=["plain", "distilled"])
def test_layer_decay_lowers_the_learning_rate_from_block_to_block(flags):
    model, optimizer = optimizer_of("--layer_decay", "0.5", *flags)
    lrs = options_of(model, optimizer, "lr")
    assert lrs.keys() == dict(model.named_parameters()).keys()
    expected = {"blocks.0.": 1.25e-4, "blocks.1.": 2.5e-4, "blocks.2.": 5e-4, "norm.": 5e-4}
    expected |= {"head": 1e-3}
    for name, lr in lrs.items():
        place = next((prefix for prefix in expected if name.startswith(prefix)), None)
        # The stem: tokens, position embedding and patch embedding.
        assert lr == pytest.approx(expected.get(place, 6.25e-5)), name
    assert lrs["blocks.1.attn.rpe_v.lookup_table_weight"] == pytest.approx(2.5e-4)


def test_layer_decay_does_not_change_the_weight_decay():
    decays = [
        options_of(*optimizer_of(*flags), "weight_decay") for flags in ([], ["--layer_decay=0.7"])
    ]
    assert decays[0] == decays[1]
    assert decays[0]["blocks.0.attn.rpe_k.lookup_table_weight"] == 0.05


def test_the_log_shows_the_learning_rates_with_layer_decay():
    model, optimizer = optimizer_of("--layer_decay", "0.5")
    lines = describe_training(model, optimizer, torch.float32)
    assert lines["learning rate"] == "0.001 to 6.25e-05 (AdamW)"


def test_a_run_with_layer_decay_and_ema_warm_up_resumes_exactly(flags, tmp_path):
    run = [*flags, "--layer_decay", "0.7", "--model_ema_warmup", "--epochs", "1"]
    run += ["--model_ema_decay", "0.99", "--grad_checkpointing", "--drop", "0.1", "--output_dir"]
    main([*run, str(tmp_path / "whole"), "--max_steps", "8"])
    main([*run, str(tmp_path / "parts"), "--max_steps", "3"])
    main([*run, str(tmp_path / "parts"), "--max_steps", "8", "--auto_resume"])
    whole, parts = (weights(tmp_path / name) for name in ("whole", "parts"))
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]
    # Without warm-up, the EMA of the tables, which start at zero, would be below 8 % of them.
    table = "blocks.0.attn.rpe_k.lookup_table_weight"
    assert whole[f"ema.{table}"].norm() > 0.2 * whole[table].norm()


@pytest.mark.parametrize("extra", [[], ["--distillation_token"]], ids=["plain", "distilled"])
def test_gradients_with_checkpointing_equal_those_without(extra):
    gradients = []
    for flag in ("--no-grad_checkpointing", "--grad_checkpointing"):
        config = parse_args([*SMALL.split(), *extra, flag, "--drop", "0.2", "--drop_path", "0.3"])
        model = create_model(config, 10).train()
        assert model.grad_checkpointing == config.grad_checkpointing
        for name, parameter in model.named_parameters():
            if "lookup_table" in name:
                torch.nn.init.normal_(parameter)
        torch.manual_seed(1)
        model(torch.randn(4, 3, 16, 16)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_model_without_checkpointing_is_refused(failure, digits):
    run = ["--data_set", "DIGITS", "--data_path", str(digits), "--device", "cpu"]
    code, line = failure(*run, "--model", "pit_ti_224", "--grad_checkpointing")
    assert code == 2
    assert "model 'pit_ti_224' cannot be built with these options" in line
    assert "gradient checkpointing not supported" in line
