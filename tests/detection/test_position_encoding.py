"""Absolute position encodings: equations, padding, limits."""

import math

import pytest
import torch

from detection.position_encoding import build_position_encoding
from tests.recipes import fill


def test_sine_is_the_equation_with_the_row_first():
    encoding = build_position_encoding("sine", 12)(torch.zeros(1, 3, 5, dtype=torch.bool))
    assert encoding.shape == (1, 12, 3, 5)
    for i in range(6):
        wave = math.sin if i % 2 == 0 else math.cos
        for axis, position, length in ((0, 2, 3), (6, 4, 5)):
            angle = position / length * 2 * math.pi / 10000 ** (2 * (i // 2) / 6)
            row, column = (position - 1, 0) if axis == 0 else (0, position - 1)
            assert encoding[0, axis + i, row, column].item() == pytest.approx(wave(angle), abs=1e-5)


@pytest.mark.parametrize("kind", ["sine", "learned", "none"])
def test_padding_does_not_change_the_encoding_of_an_image(kind):
    encode = fill(build_position_encoding(kind, 16))
    mask = torch.ones(2, 7, 9, dtype=torch.bool)
    mask[0, :4, :6] = mask[1] = False
    alone = encode(mask[:1, :4, :6])
    padded = encode(mask)
    assert padded.shape == (2, 16, 7, 9)
    torch.testing.assert_close(padded[:1, :, :4, :6], alone)
    assert padded.isfinite().all()


def test_learned_is_a_vector_per_column_then_one_per_row():
    encode = build_position_encoding("learned", 6)
    encoding = encode(torch.zeros(2, 3, 5, dtype=torch.bool))
    assert torch.equal(encoding[1, :3, 2, 4], encode.col_embed.weight[4])
    assert torch.equal(encoding[1, 3:, 2, 4], encode.row_embed.weight[2])
    assert encode.row_embed.weight.shape == (50, 3)
    assert 0 <= encode.row_embed.weight.min() < encode.row_embed.weight.max() <= 1


def test_none_is_zero():
    encoding = build_position_encoding("none", 6)(torch.zeros(2, 3, 5, dtype=torch.bool))
    assert torch.equal(encoding, torch.zeros(2, 6, 3, 5))


def test_invalid_kinds_and_sizes_are_refused():
    with pytest.raises(ValueError, match="must be sine, learned or none, got 'cosine'"):
        build_position_encoding("cosine", 12)
    with pytest.raises(ValueError, match=r"hidden_dim must be a multiple of 4 .* got 30"):
        build_position_encoding("sine", 30)
    with pytest.raises(ValueError, match=r"at most 50 x 50 .* got 4 x 51"):
        build_position_encoding("learned", 6)(torch.zeros(1, 4, 51, dtype=torch.bool))
