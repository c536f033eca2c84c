"""Options that are odd alone or together: refused in one sentence, or they build and train."""

import pytest
import timm.optim
import torch

from classification.build import create_model, create_optimizer, create_schedule, create_step
from classification.config import ClassificationConfig
from engine import UsageError
from engine.config import make_config

SMALL = {
    "model": "deit_tiny_patch16_224",
    "embed_dim": 24,
    "num_heads": 2,
    "depth": 1,
    "input_size": 32,
    "data_set": "DIGITS",
    "batch_size": 4,
    "epochs": 3,
    "warmup_epochs": 1,
}
SCHEDULES = ["cosine", "tanh", "step", "multistep", "poly", "plateau"]
# torch.compile builds the first step of the variants of kron, which takes minutes.
OPTIMIZERS = sorted(n for n in timm.optim.list_optimizers() if not n.startswith("kron"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def train(**changes) -> str:
    """Build from the options and train two steps; return the sentence of a refusal, else empty."""
    try:
        config = make_config(ClassificationConfig, SMALL | changes)
        model = create_model(config, 10)
        step = create_step(config, 10, torch.device("cpu"))
        optimizer = create_optimizer(config, model, config.batch_size)
        scheduler = create_schedule(config, optimizer)
    except UsageError as error:
        return str(error)
    for epoch in range(2):
        images = torch.randint(256, (4, 3, *config.image_size), dtype=torch.uint8)
        nothing = [[]] * 4
        step(model, (images, torch.arange(4), nothing, nothing))["loss"].backward()
        optimizer.step()
        scheduler.step(epoch, 0.5)
    return ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2**64}, "seed must be less than 18446744073709551616"),
        ({"cutmix_minmax": (0.8, 0.2)}, "cutmix_minmax must be a minimum and a larger maximum"),
        ({"cutmix_minmax": (0.5, 0.5)}, "cutmix_minmax must be a minimum and a larger maximum"),
        ({"cutmix_minmax": (-0.5, 0.5)}, "both in [0, 1], got (-0.5, 0.5)"),
        ({"cutmix_minmax": (0.5, 1.5)}, "both in [0, 1], got (0.5, 1.5)"),
        ({"cutmix_minmax": (0, 1e-9)}, "--cutmix-minmax must have at least one pixel between"),
        ({"opt_betas": (0.9, 1)}, "opt_betas must be two values in [0, 1), got (0.9, 1)"),
        ({"opt_betas": (-1, 0.5)}, "opt_betas must be two values in [0, 1), got (-1, 0.5)"),
        ({"patch_size": 64}, "--patch-size must be at most the smaller side of the images, 32"),
        ({"num_heads": 5}, "cannot be built with these options"),
        ({"depth": 10**8}, "depth must be less than or equal to 1000"),
        ({"lr_noise": (0.1,), "lr_noise_pct": 0}, "lr_noise_pct must be greater than 0, got 0"),
        ({"lr_noise": (0.1,), "lr_noise_pct": 1e-300}, "--lr-noise-pct must be at least"),
        ({"lr_noise": (0.1,), "lr_noise_std": 1e300}, "--lr-noise-pct must be at least"),
        ({"sched": "plateau", "decay_rate": 2.0}, "--sched plateau cannot be used with these"),
        ({"opt": "adahessian"}, "--opt must be an optimizer without second derivatives, got 'ada"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_allowed(changes, words):
    assert words in train(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 2**64 - 1}, {"cutmix_minmax": (0, 1)}, {"opt_betas": (0, 0)}, {"patch_size": 32}],
)
def test_the_largest_and_smallest_allowed_values_train(changes):
    assert train(**changes) == ""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_timm_trains_or_is_refused_by_name(name):
    refusal = train(opt=name)
    assert not refusal or f"--opt {name} " in refusal or repr(name) in refusal


@pytest.mark.parametrize("sched", SCHEDULES)
@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 1},
        {"epochs": 1, "warmup_epochs": 0},
        {"warmup_epochs": 500},
        {"decay_epochs": 1e-9},
        {"decay_rate": 1e300},
        {"min_lr": 10.0},
        {"lr_noise": (0.0,)},
        {"lr_noise": (0.9, 0.1)},
        {"patience_epochs": 0},
        {"epochs": 10**12},
    ],
    ids=str,
)
def test_every_schedule_trains_or_is_refused(sched, changes):
    assert "\n" not in train(sched=sched, **changes)
