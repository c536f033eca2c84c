"""The choice of attention by measurement, with a fake clock and with candidates of the CPU."""

import json
import logging

import pytest
import torch

from irpe_core import (
    CheckpointError,
    RPEAttention,
    RPEConfig,
    autotune,
    candidates,
    functional,
    parse_rpe_spec,
    set_implementation,
)
from irpe_core.autotune import Autotuner
from irpe_core.candidates import COMPOSED, Kind, Size, measure
from rpe_ops import implementations
from tests.recipes import fill
from tests.rpe_ops.extension import provide_library

CPU = torch.device("cpu")
CPP, REFERENCE = "cpp", "reference"
KIND = Kind(RPEConfig(rpe_on="qk", skip=1), 2, 8, 4, 32, torch.float32, True, True, True)
SIZE = Size(3, 4, 5)


@pytest.fixture(autouse=True)
def cpu_candidates(monkeypatch, tmp_path):
    """Let "auto" choose among candidates that run on the CPU, as it does on a GPU."""
    provide_library()
    monkeypatch.setenv("IRPE_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (candidates, autotune):
        monkeypatch.setattr(module, "CANDIDATES", (CPP, REFERENCE, COMPOSED))
    resolve = functional.fused_implementation
    monkeypatch.setattr(
        functional,
        "fused_implementation",
        lambda choice, device: "triton" if choice == "auto" else resolve(choice, device),
    )
    monkeypatch.setattr(autotune, "_BY_SHAPE", CPP)


@pytest.fixture
def clock(monkeypatch):
    """Times of the candidates in seconds, instead of measured ones."""
    times = {CPP: 2e-3, REFERENCE: 3e-3, COMPOSED: 4e-3}
    monkeypatch.setattr(candidates, "_seconds", lambda problem, name: times[name])
    return times


@pytest.fixture
def tuner(monkeypatch):
    """A new autotuner, which `rpe_attention` uses."""
    tuner = Autotuner()
    for module in (functional, autotune):
        monkeypatch.setattr(module, "AUTOTUNER", tuner)
    return tuner


@pytest.fixture
def ran(monkeypatch):
    """Candidates that `rpe_attention` ran, in order."""
    names = []

    def record(function):
        def attend(q, *rest):
            names.append(COMPOSED if function is composed else rest[-1])
            return function(q, *rest)

        return attend

    composed, fused = functional.composed_attention, functional.fused_attention
    monkeypatch.setattr(functional, "composed_attention", record(composed))
    monkeypatch.setattr(functional, "fused_attention", record(fused))
    return names


def layer(letters="qkv", **options):
    config = parse_rpe_spec(f"rpe-1.9-product-ctx-1-{letters}", skip=1)
    return fill(RPEAttention(16, 2, config, **options))


def saved(tmp_path):
    (table,) = json.loads((tmp_path / "irpe/autotune.json").read_text()).values()
    return table


@pytest.mark.parametrize("fastest", [CPP, REFERENCE, COMPOSED])
def test_the_fastest_one_runs(clock, tuner, ran, fastest):
    clock[fastest] = 1e-3
    x, attention = torch.randn(3, 17, 16), layer()
    out = attention(x)
    assert ran == [fastest]
    (choices,) = tuner.state_dict().values()
    assert list(choices.values()) == [fastest]
    set_implementation(attention, "reference", CPU)
    torch.testing.assert_close(out, attention(x))


def test_candidates_are_really_timed():
    times = measure(KIND, SIZE, CPU)
    assert times.keys() == {CPP, REFERENCE, COMPOSED}
    assert list(times.values()) == sorted(times.values())
    assert 0 < min(times.values()) < max(times.values()) < 10


@pytest.mark.parametrize("kind", [KIND, KIND._replace(training=False, dropout=False)])
@pytest.mark.parametrize("index", [0, -1], ids=["output", "last gradient"])
@pytest.mark.parametrize("fault", ["offset", "nan", "error"])
def test_what_fails_the_check_is_never_chosen(monkeypatch, caplog, clock, kind, index, fault):
    attend = candidates._attend

    def faulty(problem, name, dropout_p):
        results = list(attend(problem, name, dropout_p))
        if name == CPP and fault == "error":
            raise RuntimeError("no kernel image")
        if name == CPP:
            results[index] = results[index] + (float("nan") if fault == "nan" else 0.5)
        return tuple(results)

    monkeypatch.setattr(candidates, "_attend", faulty)
    with caplog.at_level(logging.WARNING, "irpe_core"):
        assert list(measure(kind, SIZE, CPU)) == [REFERENCE, COMPOSED]
    expected = "cannot run: no kernel image" if fault == "error" else "is wrong by up to"
    assert f"attention cpp {expected}" in caplog.text


def test_an_error_tells_that_no_candidate_is_right(monkeypatch, clock):
    monkeypatch.setattr(candidates, "_is_correct", lambda name, problem: False)
    with pytest.raises(RuntimeError, match=r"no attention computes the right numbers for rpe-1\.9"):
        measure(KIND, SIZE, CPU)


def test_a_candidate_without_enough_memory_is_not_chosen(monkeypatch):
    def seconds(problem, name):
        if name != REFERENCE:
            raise torch.OutOfMemoryError
        return 1.0

    monkeypatch.setattr(candidates, "_seconds", seconds)
    assert list(measure(KIND, SIZE, CPU)) == [REFERENCE]
    monkeypatch.setattr(candidates, "CANDIDATES", (CPP, COMPOSED))
    assert list(measure(KIND, SIZE, CPU)) == [CPP]


def test_a_measurement_changes_nothing_for_the_caller(tuner):
    x, attention = torch.randn(3, 17, 16), layer(attn_drop=0.3)
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(attention(x))
    assert torch.equal(*outs)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        attention.eval()(x)
    (choices,) = tuner.state_dict().values()
    assert [name.split(" ", 6)[-1] for name in choices] == [
        "float32 dropout training",
        "bfloat16",
    ]


def test_calls_of_one_kind_share_a_choice(clock, tuner):
    attention = layer("k")
    for batch, side in ((5, 5), (8, 5), (7, 4), (9, 5), (8, 6)):
        attention(torch.randn(batch, side**2 + 1, 16))
    (choices,) = tuner.state_dict().values()
    assert [" ".join(name.split(" ")[4:6]) for name in choices] == [
        "batch<=8 tokens<=32",
        "batch<=16 tokens<=32",
        "batch<=8 tokens<=64",
    ]


def test_a_later_process_reads_the_choice(clock, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "irpe_core"):
        assert Autotuner().choose_kind(KIND, SIZE, CPU) == CPP
    assert f"attention for {KIND}: cpp 2000 µs, reference 3000 µs, composed 4000 µs" in caplog.text
    microseconds = {CPP: 2000.0, REFERENCE: 3000.0, COMPOSED: 4000.0}
    entry = {"choice": CPP, "size": [3, 4, 5], "microseconds": microseconds}
    assert saved(tmp_path) == {str(KIND): entry}
    clock[COMPOSED] = 1e-3
    assert Autotuner().choose_kind(KIND, SIZE, CPU) == CPP
    other = KIND._replace(batch=8)
    assert Autotuner().choose_kind(other, SIZE, CPU) == COMPOSED
    assert {name: entry["choice"] for name, entry in saved(tmp_path).items()} == {
        str(KIND): CPP,
        str(other): COMPOSED,
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[1, 2]",
        lambda text: '{"a": 1}',
        lambda text: text.replace('"choice": "cpp"', '"choice": "cuda/none"'),
        lambda text: text.replace('"choice": "cpp"', '"choice": []'),
        lambda text: text.replace("cpu, torch", "NVIDIA H100, torch"),
    ],
    ids=["empty", "cut", "list", "number", "unknown", "not-text", "other-gpu"],
)
def test_a_damaged_or_foreign_file_is_measured_again(clock, tmp_path, change):
    Autotuner().choose_kind(KIND, SIZE, CPU)
    file = tmp_path / "irpe/autotune.json"
    file.write_text(change(file.read_text()))
    clock[COMPOSED] = 1e-3
    assert Autotuner().choose_kind(KIND, SIZE, CPU) == COMPOSED
    content = json.loads(file.read_text())
    assert content[autotune._environment(CPU)][str(KIND)]["choice"] == COMPOSED


def test_a_cache_that_cannot_be_written_is_no_error(clock, tmp_path, caplog):
    (tmp_path / "irpe").write_text("a file instead of a folder")
    assert Autotuner().choose_kind(KIND, SIZE, CPU) == CPP
    assert "cannot write" in caplog.text


def test_choices_are_restored(clock, tuner, ran, tmp_path):
    x, attention = torch.randn(3, 17, 16), layer()
    attention(x)
    state = tuner.state_dict()
    (tmp_path / "irpe/autotune.json").unlink()
    clock[COMPOSED] = 1e-3
    fresh = Autotuner()
    fresh.load_state_dict(state)
    kind = KIND._replace(config=attention.rpe_k.config, masked=False, dropout=False)
    assert fresh.choose_kind(kind, Size(3, 4, 4), CPU) == CPP
    # A choice for another GPU has no effect.
    fresh = Autotuner()
    fresh.load_state_dict({"NVIDIA H100": next(iter(state.values()))})
    assert fresh.choose_kind(kind, Size(3, 4, 4), CPU) == COMPOSED
    # The one of this run is replaced.
    changed = {name: dict.fromkeys(table, REFERENCE) for name, table in state.items()}
    set_implementation(attention, "auto", CPU, choices=changed)
    attention(x)
    assert ran == [CPP, REFERENCE]


@pytest.mark.parametrize("state", [["cpp"], {"cpu": "cpp"}, 3])
def test_malformed_choices_are_an_error(state):
    with pytest.raises(CheckpointError, match="choices of attention must be a dict of dicts, got"):
        Autotuner().load_state_dict(state)


def test_measurements_can_be_switched_off(monkeypatch, tuner, ran, tmp_path):
    monkeypatch.setenv("IRPE_AUTOTUNE", "0")
    attention = layer()
    assert set_implementation(attention, "auto", CPU) == "fused attention by triton"
    attention(torch.randn(3, 17, 16))
    assert ran == [CPP]
    assert not tuner.state_dict()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("IRPE_AUTOTUNE", "no")
    with pytest.raises(ValueError, match="IRPE_AUTOTUNE must be 0 or 1, got 'no'"):
        set_implementation(attention, "auto", CPU)


def test_what_will_be_measured_is_described():
    described = set_implementation(layer(), "auto", CPU)
    assert described == "the fastest attention of cpp, reference, composed, " + (
        "measured at the first call"
    )


@pytest.mark.parametrize("fastest", [CPP, COMPOSED])
def test_a_compiled_layer_chooses_while_it_is_traced(clock, tuner, ran, fastest):
    clock[fastest] = 1e-3
    torch.compiler.reset()
    attention = layer()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for side in (5, 6, 7, 9):
        x = torch.randn(3, side**2 + 1, 16, requires_grad=True)
        expected = torch.autograd.grad(attention(x).square().sum(), x)
        actual = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert set(ran) == {fastest}
    (choices,) = tuner.state_dict().values()
    assert len(choices) == 3


def test_variants_of_triton_are_candidates(monkeypatch):
    monkeypatch.undo()
    names = ("triton/flat", "triton/flat_wide", "triton/rows", COMPOSED)
    assert names == candidates.CANDIDATES
    for name in names[:3]:
        assert implementations.resolve(name, CPU, "attention") == name
    with pytest.raises(
        ValueError, match="variant of triton's attention must be one of flat, flat_wide, rows"
    ):
        implementations.resolve("triton/big", CPU, "attention")
    with pytest.raises(ValueError, match="variant of triton's gather must be one of none"):
        implementations.resolve("triton/rows", CPU, "gather")
