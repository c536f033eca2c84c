"""The optimizer step: the same update with and without gradient scaling; overflows are skipped."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from engine import TrainState, make_scaler
from engine.optim import optimizer_step
from tests.engine.toy import equal

CPU = torch.device("cpu")


def update(dtype: torch.dtype, clip: float | None, factor: float = 1.0) -> torch.Tensor:
    """Return the weights after one step on the same gradients, scaled if the type needs it."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = make_scaler(CPU, dtype)
    scaler.scale(factor * model(torch.ones(2, 5)).square().sum()).backward()
    optimizer_step(optimizer, scaler, clip)
    assert all(p.grad is None for p in model.parameters())
    return parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("clip", [None, 1e-2, 1e3], ids=["none", "small", "large"])
def test_scaling_changes_neither_clipping_nor_update(clip):
    start = update(torch.float32, None, factor=0.0)
    plain = update(torch.float32, clip)
    assert not torch.equal(plain, start)
    assert torch.equal(update(torch.bfloat16, clip), plain)
    torch.testing.assert_close(update(torch.float16, clip), plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 1.0], ids=["no clipping", "clipping"])
def test_a_step_with_an_overflow_is_skipped(clip):
    start = update(torch.float32, None, factor=0.0)
    assert torch.equal(update(torch.float16, clip, factor=torch.inf), start)


def test_a_checkpoint_restores_scaler_and_optimizer():
    def create_state() -> TrainState:
        model = nn.Linear(2, 2)
        return TrainState(model, torch.optim.AdamW(model.parameters()), scaler())

    def scaler() -> torch.amp.GradScaler:
        return make_scaler(CPU, torch.float16)

    state = create_state()
    state.scaler.scale(state.model(torch.ones(1, 2)).sum() * torch.inf).backward()
    optimizer_step(state.optimizer, state.scaler, None)
    state.scaler.scale(state.model(torch.ones(1, 2)).sum()).backward()
    optimizer_step(state.optimizer, state.scaler, None)
    state.finish_epoch()
    state.step, state.best = 7, 81.5
    other = create_state()
    assert other.scaler.get_scale() != state.scaler.get_scale()
    other.load_state_dict(state.state_dict())
    assert equal(other.scaler.state_dict(), state.scaler.state_dict())
    assert equal(other.optimizer.state_dict(), state.optimizer.state_dict())
    assert (other.epoch, other.step, other.best) == (1, 7, 81.5)
