"""Configurations and specs: accepted and refused values, error messages, and writing."""

import dataclasses
import math
import re

import pytest

from irpe_core import METHODS, RPEConfig, format_rpe_spec, get_rpe_config, parse_rpe_spec


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("ratio", 0, "ratio must be a finite number > 0, got 0"),
        ("ratio", -1.9, "ratio must be a finite number > 0, got -1.9"),
        ("ratio", math.nan, "ratio must be a finite number > 0, got nan"),
        ("ratio", math.inf, "ratio must be a finite number > 0, got inf"),
        ("ratio", 100.5, "ratio must be at most 100, got 100.5"),
        ("ratio", 10**400, "ratio must be at most 100, got 1000"),
        ("ratio", True, "ratio must be a finite number > 0, got True"),
        ("ratio", "1.9", "ratio must be a finite number > 0, got '1.9'"),
        ("ratio", None, "ratio must be a finite number > 0, got None"),
        ("method", "Product", "method must be one of euc, quant, cross, product, got 'Product'"),
        ("method", "", "method must be one of euc, quant, cross, product, got ''"),
        ("mode", "biased", "mode must be one of bias, ctx, got 'biased'"),
        ("shared_head", 2, "shared_head must be 0 or 1, got 2"),
        ("shared_head", "1", "shared_head must be 0 or 1, got '1'"),
        ("shared_head", None, "shared_head must be 0 or 1, got None"),
        ("skip", -1, "skip must be a whole number >= 0, got -1"),
        ("skip", 1.0, "skip must be a whole number >= 0, got 1.0"),
        ("skip", True, "skip must be a whole number >= 0, got True"),
        ("rpe_on", "K", "rpe_on must be one or more of the letters q, k, v, each once, got 'K'"),
        ("rpe_on", "kk", "each once, got 'kk'"),
        ("rpe_on", "qxk", "got 'qxk'"),
        ("rpe_on", "", "got ''"),
        ("rpe_on", None, "got None"),
        ("rpe_on", ["k"], r"got \['k'\]"),
    ],
)
def test_the_error_names_the_bad_field_its_value_and_what_is_allowed(part, value, message):
    with pytest.raises(ValueError, match=message):
        RPEConfig(**{part: value})
    with pytest.raises(ValueError, match=message):
        get_rpe_config(**{part: value})


@pytest.mark.parametrize("rpe_on", ["v", "kv", "qkv"])
def test_values_have_no_bias(rpe_on):
    with pytest.raises(ValueError, match=f"mode='bias', got '{rpe_on}': values have no bias"):
        RPEConfig(mode="bias", rpe_on=rpe_on)
    with pytest.raises(ValueError, match="values have no bias"):
        parse_rpe_spec(f"rpe-1.9-product-bias-1-{rpe_on}")


def test_a_configuration_is_frozen_hashable_and_normalized():
    config = RPEConfig(ratio=20, rpe_on="vkq", shared_head=1)
    assert config == RPEConfig(ratio=20.0, rpe_on="qkv", shared_head=True)
    assert hash(config) == hash(RPEConfig(ratio=20.0, rpe_on="qkv"))
    assert config.shared_head is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 2.0


def test_get_rpe_config_keeps_the_names_of_the_original():
    config = get_rpe_config(
        ratio=2.0, method="euc", mode="contextual", shared_head=False, skip=1, rpe_on="qk"
    )
    assert config == RPEConfig(2.0, "euc", "ctx", False, 1, "qk")
    assert get_rpe_config() == RPEConfig()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("rpe", "has 1 part instead of 6"),
        ("rpe-1.9-product-ctx-1", "has 5 parts instead of 6"),
        ("rpe-1.9-product-ctx-1-k-k", "has 7 parts instead of 6"),
        ("RPE-1.9-product-ctx-1-k", "does not begin with 'rpe'"),
        (" rpe-1.9-product-ctx-1-k", "does not begin with 'rpe'"),
        ("rpe--1.9-product-ctx-1-k", "has 7 parts instead of 6"),
    ],
)
def test_the_error_of_a_malformed_spec_shows_the_form_and_the_reason(spec, reason):
    with pytest.raises(ValueError, match=r"^rpe spec must have the form rpe-\{ratio\}-") as caught:
        parse_rpe_spec(spec)
    assert str(caught.value).endswith(f", got {spec!r}, which {reason}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rpe-nan-product-ctx-1-k", "ratio must be a decimal number > 0, got 'nan'"),
        ("rpe-inf-product-ctx-1-k", "ratio must be a decimal number > 0, got 'inf'"),
        ("rpe-1e1-product-ctx-1-k", "ratio must be a decimal number > 0, got '1e1'"),
        ("rpe-1_0-product-ctx-1-k", "ratio must be a decimal number > 0, got '1_0'"),
        ("rpe-٢-product-ctx-1-k", "ratio must be a decimal number > 0, got '٢'"),
        ("rpe--product-ctx-1-k", "ratio must be a decimal number > 0, got ''"),
        ("rpe-0-product-ctx-1-k", "ratio must be a finite number > 0, got 0.0"),
        (f"rpe-{'9' * 400}-product-ctx-1-k", "ratio must be a finite number > 0, got inf"),
        ("rpe-1.9-prod-ctx-1-k", "method must be one of euc, quant, cross, product, got 'prod'"),
        ("rpe-1.9-product-contextual-1-k", "mode must be one of bias, ctx, got 'contextual'"),
        ("rpe-1.9-product-ctx-2-k", "shared_head must be 0 or 1, got '2'"),
        ("rpe-1.9-product-ctx-True-k", "shared_head must be 0 or 1, got 'True'"),
        ("rpe-1.9-product-ctx-1-K", "letters q, k, v, each once, got 'K'"),
        ("rpe-1.9-product-ctx-1-kk", "each once, got 'kk'"),
        ("rpe-1.9-product-ctx-1-", "each once, got ''"),
        ("rpe-1.9-product-ctx-1-k ", "each once, got 'k '"),
    ],
)
def test_the_error_of_a_bad_part_names_the_spec_the_part_and_what_is_allowed(spec, message):
    with pytest.raises(ValueError, match=f"rpe spec {re.escape(repr(spec))}.*{re.escape(message)}"):
        parse_rpe_spec(spec)


@pytest.mark.parametrize("ratio", [1e-05, 0.1, 1.9, 2, 20, 33.333333333333336, 100.0])
@pytest.mark.parametrize("method", METHODS)
def test_writing_and_reading_a_spec_gives_the_same_configuration(ratio, method):
    for mode, rpe_on in (("ctx", "qkv"), ("bias", "k")):
        for shared_head in (False, True):
            config = RPEConfig(ratio, method, mode, shared_head, 0, rpe_on)
            assert parse_rpe_spec(format_rpe_spec(config)) == config


@pytest.mark.parametrize(
    "spec", ["rpe-1.9-product-ctx-1-k", "rpe-2.0-cross-bias-0-qk", "rpe-20.0-euc-ctx-1-qkv"]
)
def test_reading_and_writing_a_published_spec_gives_the_same_spec(spec):
    assert format_rpe_spec(parse_rpe_spec(spec)) == spec


def test_skipped_tokens_are_not_part_of_a_spec():
    assert parse_rpe_spec("rpe-1.9-product-ctx-1-k", skip=2).skip == 2
    assert parse_rpe_spec("rpe-1.9-product-ctx-1-k").num_buckets == 49


def test_an_empty_spec_is_no_encoding():
    assert parse_rpe_spec("") is None
    assert format_rpe_spec(None) == ""
