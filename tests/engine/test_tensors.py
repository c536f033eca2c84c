"""Nested tensors: all types of containers, copies, values that are not finite, wrapped models."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from engine import copy_to, unwrap
from engine.tensors import is_finite, iter_tensors

Boxes = namedtuple("Boxes", "corners labels")
CPU = torch.device("cpu")


def tree() -> dict:
    return {
        "pair": (torch.ones(2), [torch.zeros(3)]),
        "boxes": Boxes(torch.ones(1, 4), torch.tensor([7])),
        "name": "a",
        "size": 5,
        "nothing": None,
    }


def test_containers_keep_their_type_and_other_objects_are_the_same():
    given, got = tree(), copy_to(tree(), CPU)
    assert isinstance(got["pair"], tuple)
    assert isinstance(got["pair"][1], list)
    assert isinstance(got["boxes"], Boxes)
    assert (got["name"], got["size"], got["nothing"]) == ("a", 5, None)
    pairs = list(zip(iter_tensors(given), iter_tensors(got), strict=True))
    assert len(pairs) == 4
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_copy_shares_no_memory():
    given = tree()
    for tensor in iter_tensors(copy_to(given, CPU)):
        tensor.fill_(9)
    assert all(not (tensor == 9).any() for tensor in iter_tensors(given))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_single_number_that_is_not_finite_is_found(value):
    bad = tree()
    assert is_finite(bad)
    bad["boxes"].corners[0, 3] = value
    assert not is_finite(bad)


def test_only_compiled_and_distributed_models_are_unwrapped():
    model = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    assert unwrap(model) is model
    assert unwrap(torch.compile(model, backend="eager")) is model
