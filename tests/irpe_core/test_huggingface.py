"""add_irpe on vision models of Hugging Face transformers, built without a download."""

import pytest
import torch
from torch import nn

from irpe_core import RPEConfig, add_irpe, load_checkpoint, load_weights, set_grid
from irpe_core.huggingface import RPETransformersAttention
from tests.recipes import fill

transformers = pytest.importorskip("transformers", minversion="5")

SPEC = "rpe-1.9-product-ctx-1-qkv"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
DETR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 5,
}
# Prefix of the class names, and number of tokens before the grid.
FAMILIES = {"ViT": 1, "DeiT": 2, "Dinov2": 1, "Dinov2WithRegisters": 5}


def vit(family: str = "ViT", implementation: str = "sdpa") -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**SMALL)
    model = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    model.set_attn_implementation(implementation)
    return fill(model)


def detr(implementation: str = "sdpa") -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = transformers.DetrConfig(backbone_config=backbone, **DETR)
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(config).eval()
    if implementation == "eager":
        model.set_attn_implementation("eager")
    return model


def attentions(model: nn.Module) -> list[RPETransformersAttention]:
    return [m for m in model.modules() if isinstance(m, RPETransformersAttention)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_the_same_until_its_tables_are_trained(family, implementation, training):
    model = vit(family, implementation).double().train(training)
    images, names = torch.randn(2, 3, 32, 48, dtype=torch.float64), set(model.state_dict())
    # DINOv2 resamples its position embedding without being asked.
    options = {} if "Dino" in family else {"interpolate_pos_encoding": True}
    before = model(images, **options).logits
    add_irpe(model, SPEC)
    torch.testing.assert_close(model(images, **options).logits, before, rtol=0, atol=5e-7)
    assert {a.rpe_k.config.skip for a in attentions(model)} == {FAMILIES[family]}
    assert {a.grid for a in attentions(model)} == {(4, 6)}
    tables = {name: p for name, p in model.named_parameters() if "lookup_table" in name}
    assert len(tables) == 6
    assert set(model.state_dict()) == names | set(tables)
    model(images, **options, output_hidden_states=True).hidden_states[-1].square().sum().backward()
    assert all(table.grad.abs().max() > 0 for table in tables.values())
    fill(model)
    assert (model(images, **options).logits - before).abs().max() > 1e-3


def test_the_grid_follows_the_images():
    model = add_irpe(vit(), SPEC)
    model(torch.randn(1, 3, 24, 64), interpolate_pos_encoding=True)
    assert {a.grid for a in attentions(model)} == {(3, 8)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_encoder_of_detr_keeps_its_padding_mask(implementation):
    model = detr(implementation)
    images, mask = torch.randn(2, 3, 64, 80), torch.ones(2, 64, 80, dtype=torch.long)
    mask[1, :, 48:] = 0
    before = [model(images).logits, model(images, mask).logits]
    decoder = set(model.model.decoder.state_dict())
    add_irpe(model, SPEC)
    assert set(model.model.decoder.state_dict()) == decoder
    assert len(attentions(model)) == 2
    for expected, pixel_mask in zip(before, (None, mask), strict=True):
        out = model(images, pixel_mask).logits
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    assert (before[0][1] - before[1][1]).abs().max() > 1e-4
    assert attentions(model)[0].grid == (8, 10)
    assert attentions(model)[0].rpe_k.config.skip == 0
    # Pixels below the padding must not change a trained model either.
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    encoder = model.model.encoder
    tokens, allowed = torch.randn(1, 80, 32), torch.ones(1, 80, dtype=torch.long)
    allowed[0, 40:] = 0
    changed = torch.cat([tokens[:, :40], torch.randn(1, 40, 32)], 1)
    first, second = (encoder(x, allowed).last_hidden_state[:, :40] for x in (tokens, changed))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(encoder(tokens).last_hidden_state[:, :40], first)


def test_an_encoder_alone_uses_the_grid_that_is_set():
    encoder = add_irpe(detr().model.encoder, SPEC, grid=(2, 8))
    fill(encoder)
    tokens = torch.randn(1, 16, 32)
    wide = encoder(tokens).last_hidden_state
    set_grid(encoder, (8, 2))
    assert not torch.allclose(encoder(tokens).last_hidden_state, wide)


def test_layers_are_selected_by_index_and_name():
    model = add_irpe(vit(), SPEC, layers=[0])
    assert len(attentions(model)) == 1
    add_irpe(model, SPEC, layers=["vit.layers.1.attention"])
    assert len(attentions(model)) == 2
    with pytest.raises(ValueError, match="already has iRPE"):
        add_irpe(model, SPEC, layers=["vit.layers.1.attention"])
    with pytest.raises(ValueError, match=r"rpe\.skip must be 2, the model's prefix tokens, got 1"):
        add_irpe(vit("DeiT"), RPEConfig(skip=1))


def test_a_mask_of_flash_attention_is_refused():
    attention = attentions(add_irpe(vit(), SPEC))[0]
    with pytest.raises(ValueError, match=r"must have the shape \(B, 1, L, L\), got \(1, 25\)"):
        attention(torch.randn(1, 25, 32), torch.ones(1, 25))


def test_an_attention_with_other_layers_is_refused():
    model = vit()
    model.vit.layers[1].attention.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="must have k_proj, o_proj, q_proj, v_proj, got extra"):
        add_irpe(model, SPEC)
    assert not attentions(model)


class ViTWithIRPE(transformers.ViTForImageClassification):
    """The class of docs/equip.md."""

    def __init__(self, config):
        super().__init__(config)
        add_irpe(self, SPEC)


def test_trained_tables_are_saved_and_loaded(tmp_path):
    plain, images = vit(), torch.randn(2, 3, 32, 32)
    model = fill(add_irpe(plain, SPEC))
    expected = model(images).logits
    torch.save(model.state_dict(), tmp_path / "model.pth")
    fresh = add_irpe(vit(), SPEC)
    load_weights(fresh, load_checkpoint(tmp_path / "model.pth")["model"])
    assert torch.equal(fresh(images).logits, expected)
    model.save_pretrained(tmp_path / "folder")
    loaded = ViTWithIRPE.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(loaded(images).logits, expected)
