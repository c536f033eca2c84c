"""The examples run, and their output shows what their texts say."""

import re

import pytest

from examples import equip_timm_vit


def test_adding_irpe_to_a_trained_model_does_not_change_its_outputs(capsys):
    equip_timm_vit.main(["--epochs", "2"])
    lines = capsys.readouterr().out.splitlines()
    titles = [line.split(":")[0] for line in lines]
    assert titles == [
        "trained without iRPE",
        "iRPE added, not yet trained",
        "trained further with iRPE",
        "trained further without it",
    ]
    before, added, after, control = (float(re.search(r"([\d.]+)%", line)[1]) for line in lines)
    assert before == added
    # Chance is 10 %.
    assert min(after, control) > max(before, 20)


def test_a_bad_spec_is_refused(capsys):
    with pytest.raises(SystemExit) as leaving:
        equip_timm_vit.main(["--rpe", "rpe-1.9-product-ctx-1-x"])
    assert leaving.value.code == 2
    assert "letters q, k, v, each once, got 'x'" in capsys.readouterr().err
