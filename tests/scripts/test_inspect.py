"""The pictures of `scripts.inspect` show the tables and attention weights of the model."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from classification.build import create_model
from classification.config import parse_args
from detection.build import build_network
from engine import dump
from irpe_core import RPEAttention, RPEConfig, RPEMultiheadAttention, bucket_ids, build_rpe
from scripts.inspect.__main__ import main
from scripts.inspect.attention import attention_figure
from scripts.inspect.layers import (
    record_attention,
    relative_buckets,
    rpe_layers,
    table_by_position,
    used_buckets,
)
from scripts.inspect.tables import table_figure
from tests.commands import failure_of
from tests.detection.models import SMALL, config
from tests.recipes import fill

_SIZES = "--input_size 32 48 --patch_size 8 --embed_dim 32 --depth 2 --num_heads 2 --mlp_ratio 2"
GRID = (4, 6)


def classifier(rpe: str) -> tuple[nn.Module, dict]:
    """A classifier of 5 classes on 4 x 6 tokens, and its checkpoint."""
    options = parse_args(["--model", "deit_tiny_patch16_224", "--rpe", rpe, *_SIZES.split()])
    model = fill(create_model(options, 5).eval())
    return model, {"model": model.state_dict(), "args": dump(options)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints and an image."""
    folder = tmp_path_factory.mktemp("inspect")
    specs = {"qkv": "rpe-1.9-product-ctx-1-qkv", "v": "rpe-1.9-cross-ctx-0-v", "plain": ""}
    for name, rpe in specs.items():
        torch.save(classifier(rpe)[1], folder / f"{name}.pth")
    options = config(f"{SMALL} --enc_rpe2d rpe-9-quant-bias-0-qk --image_size 64")
    network = fill(build_network(options))
    torch.save({"model": network.state_dict(), "args": dump(options)}, folder / "detector.pth")
    torch.save({"model": network.state_dict()}, folder / "published.pth")
    Image.effect_noise((90, 60), 60).convert("RGB").save(folder / "image.jpg")
    return folder


@pytest.fixture
def failure(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run the command, and return its exit code and its one line on stderr."""
    return lambda *argv: failure_of(main, list(map(str, argv)), capsys)


@pytest.mark.parametrize("method", ["euc", "quant", "cross", "product"])
def test_relative_buckets_are_those_of_every_pair(method):
    rpe = RPEConfig(ratio=1.3, method=method, skip=1)
    relative = relative_buckets(rpe, 3, 5)
    ids = bucket_ids(method, 3, 5, 1.3)
    for number, term in enumerate(ids if method == "cross" else (ids,)):
        expected = term.view(3, 5, 3, 5) + number * rpe.num_buckets
        for row in range(3):
            for column in range(5):
                seen = relative[number, 2 - row : 5 - row, 4 - column : 9 - column]
                assert torch.equal(seen, expected[row, column])


@pytest.mark.parametrize("letter", ["q", "v"])
def test_a_position_shows_the_length_of_its_vector(letter):
    encoding = build_rpe(RPEConfig(rpe_on=letter, shared_head=False), 8, 2)["qkv".index(letter)]
    table = nn.init.normal_(encoding.lookup_table_weight)
    shown = table_by_position(letter, encoding, relative_buckets(encoding.config, 2, 3))
    ids = bucket_ids("product", 2, 3, 1.9)
    for head in range(2):
        # From the first token to the last: one row down, two columns to the right.
        vector = table[head][:, ids[0, 5]] if letter == "q" else table[head][ids[0, 5]]
        torch.testing.assert_close(shown[head, 2, 4], vector.norm())


def test_a_position_of_cross_shows_the_sum_of_both_terms():
    _, encoding, _ = build_rpe(RPEConfig(method="cross", mode="bias"), 8, 2)
    for term in (encoding.rp_rows, encoding.rp_cols):
        nn.init.normal_(term.lookup_table_bias)
    shown = table_by_position("k", encoding, relative_buckets(encoding.config, 2, 3))
    x = torch.zeros(1, 2, 6, 8)
    torch.testing.assert_close(shown[0, 1:, 2:].flatten(), encoding(x, 2, 3)[0, 0, 0])


def test_attention_is_that_of_the_equations():
    torch.manual_seed(0)
    rpe = RPEConfig(rpe_on="qkv", skip=1)
    attention = RPEAttention(16, 2, rpe, (2, 3))
    for name in ("rpe_q", "rpe_k"):
        nn.init.normal_(getattr(attention, name).lookup_table_weight)
    x = torch.randn(1, 7, 16)
    (found,) = record_attention(attention, x)
    q, k, _ = attention.qkv(x)[0].view(7, 3, 2, 8).permute(1, 2, 0, 3)
    ids = bucket_ids("product", 2, 3, 1.9, skip=1)
    added = torch.einsum("hid,dij->hij", q, attention.rpe_k.table()[0][:, ids])
    added = (added + torch.einsum("hjd,dij->hij", k, attention.rpe_q.table()[0][:, ids.T])) / 8**0.5
    logits = q @ k.transpose(1, 2) / 8**0.5
    torch.testing.assert_close(found.with_rpe, (logits + added).softmax(-1).mean(0))
    torch.testing.assert_close(found.without, logits.softmax(-1).mean(0))
    torch.testing.assert_close(found.added, added.mean(0))
    assert found.grid == (2, 3)


def test_both_kinds_of_layers_give_the_same_attention():
    torch.manual_seed(0)
    rpe = RPEConfig(rpe_on="qk", mode="bias", shared_head=False)
    timm = RPEAttention(16, 2, rpe, (2, 3))
    torch_ = RPEMultiheadAttention(16, 2, batch_first=True, rpe=rpe, grid=(2, 3)).eval()
    for name in ("rpe_q", "rpe_k"):
        nn.init.normal_(getattr(timm, name).lookup_table_bias)
        getattr(torch_, name).load_state_dict(getattr(timm, name).state_dict())
    torch_.in_proj_weight, torch_.in_proj_bias = timm.qkv.weight, timm.qkv.bias

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch_

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False, hw=(2, 3))[0]

    x = torch.randn(1, 6, 16)
    (expected,), (found,) = record_attention(timm, x), record_attention(Layer(), x)
    for name in ("with_rpe", "without", "added"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_last_table_of_a_classifier_has_the_gradient_of_one_bucket_and_the_picture_says_it():
    model, _ = classifier("rpe-1.9-product-ctx-1-qkv")
    layers = rpe_layers(model)
    for layer in layers:
        for letter in "qkv":
            nn.init.zeros_(getattr(layer, f"rpe_{letter}").lookup_table_weight)
    F.cross_entropy(model(torch.randn(2, 3, 32, 48)), torch.tensor([1, 2])).backward()
    for letter in "qv":
        for layer in layers:
            weight = getattr(layer, f"rpe_{letter}").lookup_table_weight
            weight.data = weight.grad
        first, last = (used_buckets(letter, getattr(x, f"rpe_{letter}")) for x in layers)
        assert first > 1
        assert last == 1
        figure = table_figure(layers, letter, GRID, reads_class_token=True)
        titles = [axes.get_title() for axes in figure.axes]
        assert "1 of 50 buckets nonzero" in titles[1]
        texts = " ".join(text.get_text() for text in figure.texts)
        assert "Layer 2: only the class token's row reaches the loss" in texts
        figure = table_figure(layers, letter, GRID, reads_class_token=False)
        assert not any("reaches the loss" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize(
    ("letters", "query", "words"),
    [
        ("k", None, "softmax cancels it"),
        ("k", (1, 2), "the query ★ in row 1, column 2 of 4 × 6 tokens"),
        ("q", None, "with and without the iRPE on q of that layer"),
        ("v", (1, 2), "iRPE on v does not change attention weights"),
    ],
)
def test_the_picture_of_attention_says_what_has_an_effect(letters, query, words):
    model, _ = classifier(f"rpe-1.9-product-ctx-1-{letters}")
    layers = record_attention(model, torch.randn(1, 3, 32, 48))
    figure = attention_figure(layers, torch.rand(32, 48, 3), query, letters=letters, skip=1)
    texts = " ".join([figure.get_suptitle(), figure.get_supxlabel()])
    assert words in texts
    assert ("cancels" in texts) == (letters == "k" and query is None)


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("qkv", "buckets table_q table_k table_v attention attention_class_token"),
        ("v", "buckets table_v attention attention_class_token"),
        ("detector", "buckets table_q table_k attention"),
    ],
)
def test_pictures_of_a_checkpoint(name, pictures, folder, tmp_path, capsys):
    argv = [f"{folder}/{name}.pth", "--image", f"{folder}/image.jpg", "--query", "1", "0"]
    main([*argv, "--output_dir", str(tmp_path)])
    expected = [str(tmp_path / f"{picture}.png") for picture in pictures.split()]
    assert capsys.readouterr().out.splitlines() == expected
    for path in expected:
        assert min(Image.open(path).size) > 250


def test_without_an_image_the_pictures_are_next_to_the_checkpoint(folder, failure):
    main([str(folder / "v.pth")])
    assert {path.name for path in (folder / "inspect").iterdir()} == {"buckets.png", "table_v.png"}
    code, line = failure(folder / "v.pth")
    assert code == 2
    assert "buckets.png and 1 others must not exist: --force overwrites" in line
    main([str(folder / "v.pth"), "--force"])


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["plain.pth"], 1, "must be a model with iRPE, got one without"),
        (
            ["qkv.pth", "--query", "4", "0"],
            2,
            "a row from 0 to 3 and a column from 0 to 5, got 4 0",
        ),
        (["qkv.pth", "--enc_rpe2d", "x"], 2, "--enc-rpe2d must not be given for a classifier"),
        (["detector.pth", "--model", "x"], 2, "--model must not be given for a detector"),
        (["published.pth"], 2, "give --enc-rpe2d"),
        (["none.pth"], 1, "none.pth"),
        (["http://localhost/a.pth"], 2, "--output-dir must be given"),
        (["deit_tiny_patch16_224_ctx_product_50_shared_k"], 2, "--output-dir must be given"),
        (["model.onnx", "--output-dir", "x"], 2, "must be a checkpoint, got the exported file"),
        (["qkv.pth", "--image", "none.jpg"], 1, "none.jpg"),
    ],
)
def test_a_mistake_is_one_sentence(argv, code, words, folder, failure, monkeypatch):
    monkeypatch.chdir(folder)
    found, line = failure(*argv)
    assert found == code
    assert words in line


def test_without_matplotlib_the_installation_is_named(folder, failure, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, line = failure(folder / "qkv.pth")
    assert code == 1
    assert line.endswith("pip install matplotlib")
