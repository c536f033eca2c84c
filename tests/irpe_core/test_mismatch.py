"""The errors of weights that do not fit: shortened keys, and the likely cause."""

import logging
import re

import pytest
import torch
from torch import nn

from irpe_core import CheckpointError, build_rpe, load_weights, parse_rpe_spec

SPEC = "rpe-1.9-product-ctx-1-k"


class Attention(nn.Module):
    def __init__(self, spec: str, skip: int, heads: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(parse_rpe_spec(spec, skip=skip), dim, heads)


def model(spec: str = SPEC, *, skip: int = 0, heads: int = 3, dim: int = 8, layers: int = 2):
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"layers": nn.ModuleList(Attention(spec, skip, heads, dim) for _ in range(layers))}
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def mismatch(found: nn.Module, wanted: nn.Module, **options) -> str:
    before = {key: value.clone() for key, value in wanted.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(wanted, found.state_dict(), **options)
    assert all(torch.equal(value, before[key]) for key, value in wanted.state_dict().items())
    return str(caught.value)


def cause(found: nn.Module, wanted: nn.Module) -> str:
    return mismatch(found, wanted).partition("; likely cause: the checkpoint ")[2]


def test_the_whole_message_for_tables_of_another_size():
    assert mismatch(model(), model("rpe-2.0-product-ctx-1-k")) == (
        "the checkpoint does not fit ModuleDict: 2 wrongly shaped: "
        "layers.*.rpe_k.lookup_table_weight is (1, 8, 49), the model's is (1, 8, 81); likely "
        "cause: the checkpoint has 7×7 product tables (49 buckets), the model's spec asks for "
        "9×9 (81)"
    )


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ((SPEC, {"skip": 1}), ("rpe-2.5-product-ctx-1-k", {"skip": 1}), "7×7 .*50.* 11×11 .122"),
        ((SPEC, {"skip": 1}), (SPEC, {}), "of 50 buckets, the model of 49: one .* skipped tokens"),
        ((SPEC, {}), (SPEC, {"skip": 2}), "of 49 buckets, the model of 50: one .* skipped tokens"),
        (("rpe-12-euc-ctx-1-k", {}), ("rpe-20-euc-ctx-1-k", {}), "of 49 buckets, the model of 81$"),
        (("rpe-3.3-quant-ctx-1-k", {}), (SPEC, {}), "has tables of 13 buckets, the model of 49$"),
        (("", {}), (SPEC, {}), "has no iRPE, the model has it on k$"),
        (("rpe-1.9-product-ctx-1-qkv", {}), ("", {}), "has iRPE on q, k, v, the model has none$"),
        ((SPEC, {}), ("rpe-1.9-product-ctx-1-qkv", {}), "has iRPE on k, the model on q, k, v$"),
        (("rpe-1.9-product-ctx-1-v", {}), (SPEC, {}), "has iRPE on v, the model on k$"),
        (
            (SPEC, {}),
            ("rpe-1.9-product-ctx-0-k", {}),
            "heads share, .* for each of 3 heads",
        ),
        (("rpe-1.9-product-bias-0-k", {}), (SPEC, {}), "of mode bias, the model of ctx, and has a"),
        ((SPEC, {}), ("rpe-1.9-product-bias-1-qk", {}), "k, the model on q, k, and .* mode ctx, "),
        (("rpe-1.9-cross-ctx-1-k", {}), (SPEC, {}), "has iRPE of the method cross, unlike"),
        ((SPEC, {}), ("rpe-1.9-cross-ctx-1-k", {}), "has no iRPE of the method cross, unlike"),
        (
            ("rpe-1.9-cross-ctx-1-v", {}),
            ("rpe-3.0-cross-ctx-1-v", {}),
            "has tables of 7 buckets, the model of 13$",
        ),
        ((SPEC, {"dim": 4}), (SPEC, {}), "has heads of 4 channels, the model of 8$"),
        ((SPEC, {"layers": 3}), (SPEC, {}), "^has 3 layers, the model 2, and has iRPE in 3 "),
    ],
)
def test_the_likely_cause_of_tables_that_do_not_fit(found, wanted, expected):
    text = cause(model(found[0], **found[1]), model(wanted[0], **wanted[1]))
    assert re.search(expected, text), text


class Named(nn.Module):
    """A module with buffers of the given names and shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split("__")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(last, torch.zeros(shape))


COMMON = {"proj__bias": (2,)}


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ({"norm__weight": (192,)}, {"norm__weight": (384,)}, "is 192 channels wide, the model 384"),
        ({"head__weight": (10, 4)}, {"head__weight": (7, 4)}, "has 10 class outputs, the model 7"),
        ({"fc__weight": (10, 4)}, {"fc__weight": (7, 4)}, "has 10 class outputs, the model 7"),
        (
            {"query_embed__weight": (100, 4)},
            {"query_embed__weight": (50, 4)},
            "has 100 object queries, the model 50",
        ),
        (
            {"pos_embed": (1, 197, 4)},
            {"pos_embed": (1, 577, 4)},
            "has 197 position embeddings, the model 577 (another image size)",
        ),
        (
            {"patch_embed__proj__weight": (4, 3, 16, 16)},
            {"patch_embed__proj__weight": (4, 3, 8, 8)},
            "has patches of 16 pixels, the model of 8",
        ),
        ({"dist_token": (1, 1, 4)}, {}, "has a distillation token, the model none"),
        ({}, {"pos_embed": (1, 5, 4)}, "has no position embedding, the model has one"),
        ({"backbone__conv": (4,)}, {"backbone__conv": (8,)}, "has another backbone than the model"),
        (
            {"backbone__bn1__num_batches_tracked": ()},
            {},
            "has ordinary batch norms, the model frozen ones",
        ),
        (
            {},
            {"backbone__bn1__num_batches_tracked": ()},
            "has frozen batch norms, the model ordinary ones",
        ),
        ({"head__weight": (10,)}, {"head__weight": (7, 4)}, ""),
    ],
)
def test_the_likely_cause_in_the_parts_of_known_models(found, wanted, expected):
    assert cause(Named(**COMMON, **found), Named(**COMMON, **wanted)) == expected


def test_the_likely_cause_of_names_that_differ_by_a_prefix():
    inner, outer = Named(a=(1,)), Named(detr__a=(1,), mask=(1,))
    assert cause(inner, outer) == "lacks 'detr.' before its names, which the model has"
    assert cause(outer, inner) == "has 'detr.' before its names, which the model does not"
    assert cause(inner, Named(b=(1,))).startswith("is of another kind of model")
    assert cause(nn.Identity(), inner) == "is empty"


def test_tables_of_an_impossible_shape_are_listed():
    nonsense = Named(layers__0__rpe_k__lookup_table_weight=(), proj__bias=(2,))
    text = mismatch(nonsense, model())
    assert "layers.0.rpe_k.lookup_table_weight is (), the model's is (1, 8, 49)" in text


def test_plain_weights_load_if_allowed_and_that_is_logged(caplog):
    plain, equipped = model(""), model("rpe-1.9-product-ctx-1-qk")
    tables = {k: v.clone() for k, v in equipped.state_dict().items() if "lookup_table" in k}
    with caplog.at_level(logging.INFO):
        load_weights(equipped, plain.state_dict(), may_lack_tables=True)
    assert caplog.messages == ["the checkpoint has no iRPE: the 4 tables keep their initial values"]
    expected = plain.state_dict() | tables
    assert all(torch.equal(value, expected[key]) for key, value in equipped.state_dict().items())
    assert len(tables) == 4


def test_plain_weights_do_not_load_by_default_or_with_other_missing_keys(caplog):
    caplog.set_level(logging.INFO)
    plain, equipped = model(""), model()
    assert "2 missing: layers.*.rpe_k.lookup_table_weight" in mismatch(plain, equipped)
    del plain["layers"][0].proj.bias
    assert "1 missing: layers.0.proj.bias" in mismatch(plain, equipped, may_lack_tables=True)
    assert caplog.messages == []


def test_weights_with_only_some_of_the_tables_are_refused():
    for found, wanted in ((SPEC, "rpe-1.9-product-ctx-1-qk"), ("rpe-1.9-product-ctx-1-q", SPEC)):
        text = mismatch(model(found), model(wanted), may_lack_tables=True)
        assert "2 missing" in text


def test_nothing_is_logged_for_weights_that_fit(caplog):
    caplog.set_level(logging.INFO)
    load_weights(model(), model().state_dict(), may_lack_tables=True)
    assert caplog.messages == []
