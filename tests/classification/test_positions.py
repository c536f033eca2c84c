"""Position encodings to compare with iRPE: sines and cosines, RoPE, and a bias for each offset."""

import json

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from classification import load
from classification.config import parse_args
from classification.main import main
from classification.models import PUBLISHED, build_model
from classification.predict import ClassifierPredict
from classification.rope import RotaryAttention
from engine import parse_config
from irpe_core import bucket_ids
from tests.recipes import fill

TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
GRID = (3, 5)
HEAD_DIM = 16


def small(name="deit_tiny_patch16_224", **options):
    """Return a model with random weights for 3 x 5 patches."""
    options = {"rpe": "", "abs_pos_embed": False, **TINY, **options}
    model = build_model(name, num_classes=8, input_size=(12, 20), **options)
    return fill(model).eval()


def cells(images):
    """Return the patches (rows, columns, 3, 4, 4) of one image."""
    return images[0].unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4)


def from_cells(patches):
    """Return an image (1, 3, H, W) from its patches."""
    rows, columns = patches.shape[:2]
    return patches.permute(2, 0, 3, 1, 4).reshape(1, 3, 4 * rows, 4 * columns)


def rotated(x):
    """Rotate (B, H, 1 + h·w, d) by complex multiplication in float64."""
    rows, columns = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64) for side in GRID), indexing="ij"
    )
    frequencies = 100.0 ** (-torch.arange(HEAD_DIM // 4, dtype=torch.float64) / (HEAD_DIM // 4))
    angles = torch.cat([p.reshape(-1, 1) * frequencies for p in (rows, columns)], -1)
    pairs = torch.view_as_complex(x[:, :, 1:].double().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat([x[:, :, :1].double(), turned], 2)


def test_rope_is_a_rotation_of_queries_and_keys_by_row_and_column():
    attention = small(rpe="rope").blocks[1].attn
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    q, k, v = (
        part.unflatten(-1, (2, HEAD_DIM)).transpose(1, 2)
        for part in nn.functional.linear(
            x, attention.qkv.weight.double(), attention.qkv.bias.double()
        ).chunk(3, -1)
    )
    weights = (rotated(q) @ rotated(k).transpose(-2, -1) / HEAD_DIM**0.5).softmax(-1)
    joined = (weights @ v).transpose(1, 2).flatten(2)
    expected = nn.functional.linear(
        joined, attention.proj.weight.double(), attention.proj.bias.double()
    )
    with torch.no_grad():
        torch.testing.assert_close(attention.double()(x), expected, rtol=1e-5, atol=1e-6)


def test_rope_computes_the_same_as_the_attention_of_timm():
    layers = pytest.importorskip("timm.layers")
    if not hasattr(layers, "AttentionRope"):
        pytest.skip("this release of timm has no AttentionRope")
    attention = small(rpe="rope").blocks[0].attn
    timms = layers.AttentionRope(32, 2, num_prefix_tokens=1)
    timms.load_state_dict(attention.state_dict())
    x = torch.randn(2, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            attention(x), timms(x, rope=attention.angles.get_embed()), rtol=1e-5, atol=1e-6
        )


def test_the_logits_of_rope_depend_only_on_relative_positions():
    attention = small(rpe="rope").blocks[0].attn
    q, k = (torch.randn(1, 2, 1, HEAD_DIM).expand(-1, -1, 16, -1) for _ in range(2))
    logits = (attention.rotate(q) @ attention.rotate(k).transpose(-2, -1))[0]
    # The class token is not rotated.
    torch.testing.assert_close(logits[:, 0, 0], (q @ k.transpose(-2, -1))[0, :, 0, 0])
    pairs = logits[:, 1:, 1:].unflatten(2, GRID).unflatten(1, GRID)
    torch.testing.assert_close(pairs[:, :-1, :-1, :-1, :-1], pairs[:, 1:, 1:, 1:, 1:])
    assert not torch.allclose(pairs[:, 0, 0, 0, 1], pairs[:, 0, 1, 0, 0], atol=1e-3)


@pytest.mark.parametrize("distillation_token", [False, True])
@pytest.mark.parametrize("options", [{"rpe": "rope"}, {"abs_pos_embed": "sine"}])
def test_parameters_have_the_names_and_initial_values_of_the_plain_model(
    options, distillation_token
):
    models = []
    for each in ({}, options):
        torch.manual_seed(0)
        options = {"rpe": "", **TINY, "distillation_token": distillation_token, **each}
        models.append(
            build_model(
                "deit_tiny_patch16_224", num_classes=8, input_size=(12, 20), **options
            ).state_dict()
        )
    plain, other = models
    if "abs_pos_embed" in each:
        del plain["pos_embed"]
    assert plain.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in plain.items())


@pytest.mark.parametrize("prefix", [1, 2])
def test_sine_embeds_rows_and_columns_and_not_the_class_token(prefix):
    model = small(abs_pos_embed="sine", distillation_token=prefix == 2)
    found = model.pos_embed[0]
    assert found.shape == (prefix + 15, 32)
    assert (found[:prefix] == 0).all()
    frequencies = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    for row, column in ((0, 0), (0, 4), (2, 1)):
        angles = torch.stack([row * frequencies, column * frequencies])
        expected = torch.cat([angles.sin(), angles.cos()], -1)
        token = found[prefix + row * 5 + column]
        # timm orders the channels in its own way: sines and cosines of the two axes as a set.
        torch.testing.assert_close(
            token.double().sort().values, expected.flatten().sort().values, rtol=0, atol=1e-6
        )


def test_sine_and_rope_can_be_exported():
    model = small(rpe="rope", abs_pos_embed="sine")
    images = torch.randn(2, 3, 12, 20)
    program = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images))


@pytest.mark.parametrize(
    ("spec", "knows"),
    [
        ("rpe-1.9-euc-ctx-1-qkv", False),
        ("rpe-1.9-quant-ctx-1-qkv", False),
        ("rpe-1.9-quant-bias-0-qk", False),
        ("rpe-1.9-cross-ctx-1-k", True),
        ("rpe-1.9-product-ctx-1-k", True),
        ("rpe-4-product-bias-0-k", True),
        ("rope", True),
    ],
)
def test_only_directed_encodings_distinguish_mirrored_cells(spec, knows):
    model = small(rpe=spec)
    image = torch.randn(1, 3, 12, 20)
    mirrored = from_cells(cells(image).flip(1))
    with torch.no_grad():
        same = torch.allclose(model(image), model(mirrored), atol=1e-5)
    assert same != knows


@pytest.mark.parametrize(("height", "width"), [(6, 6), (14, 14), (5, 9)])
def test_a_ratio_of_the_largest_distance_gives_each_offset_a_bucket_as_in_swin(height, width):
    ids = bucket_ids("product", height=height, width=width, ratio=max(height, width) - 1, skip=1)
    assert len(ids.unique()) == (2 * height - 1) * (2 * width - 1) + 1
    assert len(ids[1:, 1:].unique()) == (2 * height - 1) * (2 * width - 1)
    assert len({*ids[0].tolist(), *ids[:, 0].tolist()}) == 1


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("eva02_tiny_patch14_224", {"rpe": "rope"}, "have timm's Attention, got Eva"),
        ("deit_tiny_patch16_224", {"rpe": "rope", "embed_dim": 36}, "divisible by 4.*, got 18"),
        (
            "deit_tiny_patch16_224",
            {"abs_pos_embed": "sine", "embed_dim": 34},
            "embed_dim must be divisible by 4.*, got 34",
        ),
        ("vit_relpos_small_patch16_224", {"abs_pos_embed": "sine"}, "must be true or false for"),
        (sorted(PUBLISHED)[0], {"rpe": "rope"}, "rpe must be empty for model"),
        (
            "deit_tiny_patch16_224",
            {"abs_pos_embed": "sine", "pretrained": True},
            "must be true with pretrained weights",
        ),
    ],
)
def test_encodings_that_do_not_fit_are_refused(name, options, words):
    if name.startswith("deit"):
        options = {**TINY, **options}
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        build_model(name, num_classes=8, input_size=(28, 28), **options)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["--abs_pos_embed"], True),
        (["--abs-pos-embed", "sine"], "sine"),
        (["--abs_pos_embed=sine"], "sine"),
        (["--abs_pos_embed", "false"], False),
        (["--no-abs_pos_embed"], False),
        (["--no-abs-pos-embed", "--abs_pos_embed", "--epochs", "2"], True),
    ],
)
def test_the_flag_of_the_absolute_embedding_is_a_boolean_or_sine(words, expected):
    assert parse_args(words).abs_pos_embed == expected


def test_the_flag_of_the_absolute_embedding_does_not_use_the_next_argument():
    words = ["a.pth", "--abs_pos_embed", "photo.jpg"]
    config = parse_config(ClassifierPredict, words, prog="predict")
    assert (config.abs_pos_embed, config.images) == (True, ("photo.jpg",))


def test_another_word_for_the_absolute_embedding_is_refused(failure):
    code, line = failure("--abs_pos_embed=cosine")
    assert code == 2
    assert "--abs-pos-embed must be true or false or sine, got 'cosine'" in line


ENCODINGS = {
    "none": ["--no-abs_pos_embed", "--rpe="],
    "absolute": ["--rpe="],
    "sine": ["--abs_pos_embed", "sine", "--rpe="],
    "rope": ["--no-abs_pos_embed", "--rpe", "rope"],
    "bias": ["--no-abs_pos_embed", "--rpe", "rpe-3-product-bias-0-k"],
    "k": ["--no-abs_pos_embed", "--rpe", "rpe-1.9-product-ctx-1-k"],
    "qkv and absolute": ["--rpe", "rpe-1.9-product-ctx-1-qkv"],
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_checkpoint_is_evaluated_at_its_own_and_at_another_image_size(
    name, flags, tmp_path, caplog
):
    trained = tmp_path / "trained"
    short = ["--max_train_samples", "128", "--epochs", "1", "--output_dir", str(trained)]
    main([*flags, *ENCODINGS[name], *short])
    checkpoint = str(trained / "checkpoint.pth")

    def evaluate(folder, *words):
        output = tmp_path / folder
        plain = [word for word in flags if word not in ("--rpe", "rpe-1.9-product-ctx-1-qkv")]
        main([*plain, "--eval", *words, "--output_dir", str(output)])
        found = json.loads((output / "eval.json").read_text())
        return {key: value for key, value in found.items() if key.startswith("test_")}

    line = json.loads((trained / "log.txt").read_text())
    same = evaluate("same", "--resume", checkpoint)
    assert same == {key: line[key] for key in same}
    larger = evaluate("larger", "--resume", checkpoint, "--input_size", "24")
    assert larger["test_loss"] != same["test_loss"]
    learned = name in ("absolute", "qkv and absolute")
    words = "position embedding resampled to a grid of 6 x 6"
    assert (words in caplog.text) == learned
    if name != "none":
        assert larger["test_loss"] == pytest.approx(same["test_loss"], abs=1.0)
    assert load(checkpoint).model.patch_embed.grid_size == (4, 4)


def test_an_evaluation_at_another_size_interpolates_weights_and_ema_bicubically(
    flags, trained, monkeypatch
):
    from classification import training

    seen = {}
    run = training.run_evaluation
    monkeypatch.setattr(
        training,
        "run_evaluation",
        lambda session, model, *args, **kwargs: (
            seen.update(model=model, ema=kwargs["ema"].module),
            run(session, model, *args, **kwargs),
        ),
    )
    checkpoint = trained / "checkpoint.pth"
    main([*flags, "--eval", "--resume", str(checkpoint), "--input_size", "24", "16"])
    content = torch.load(checkpoint, weights_only=True)
    for key, weights in (("model", content["model"]), ("ema", content["model_ema"])):
        expected = resample_abs_pos_embed(weights["pos_embed"], [6, 4], [4, 4])
        assert torch.equal(seen[key].pos_embed, expected)


def test_training_does_not_resume_at_another_image_size(flags, trained, failure):
    checkpoint = str(trained / "checkpoint.pth")
    code, line = failure(*flags, "--epochs", "3", "--resume", checkpoint, "--input_size", "24")
    assert code == 1
    assert "pos_embed" in line


def test_every_block_has_a_rotary_attention_with_the_same_angles():
    model = small(rpe="rope")
    assert all(type(block.attn) is RotaryAttention for block in model.blocks)
    assert len({id(block.attn.angles) for block in model.blocks}) == 1
    assert not any("angles" in name for name in model.state_dict())
