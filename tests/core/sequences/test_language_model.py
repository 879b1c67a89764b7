"""The language model against its equations by hand, causality, and torch's own encoder."""

import math

import pytest
import torch
from torch import nn

from provenn.core.experiment.seeding import seeded
from provenn.core.sequences.language_model import LanguageModel, next_token_loss


def model(**sizes):
    with seeded("weights"):
        return LanguageModel(**({"vocabulary": 11, "dim": 8, "depth": 2, "heads": 2, "length": 6} | sizes)).double()


def tokens(batch, length, seed=0):
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_equals_torchs_pre_norm_encoder_with_the_same_weights():
    ours = model()
    with torch.no_grad():
        for param in ours.parameters():
            param.normal_(generator=torch.Generator().manual_seed(param.numel()))
    x = ours.tokens.weight[tokens(3, 5)] + ours.positions.weight[:5]
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for block in ours.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True).double()
        attention = block.attention
        packed = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        zero = torch.zeros
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": packed,
                "self_attn.in_proj_bias": zero(24),
                "self_attn.out_proj.weight": attention.out_proj.weight,
                "self_attn.out_proj.bias": zero(8),
                "linear1.weight": block.mlp[0].weight,
                "linear1.bias": zero(32),
                "linear2.weight": block.mlp[2].weight,
                "linear2.bias": zero(8),
                "norm1.weight": block.attention_norm.weight,
                "norm1.bias": block.attention_norm.bias,
                "norm2.weight": block.mlp_norm.weight,
                "norm2.bias": block.mlp_norm.bias,
            }
        )
        x = layer(x, src_mask=mask)
    wanted = nn.functional.layer_norm(x, (8,), ours.norm.weight, ours.norm.bias) @ ours.tokens.weight.T
    torch.testing.assert_close(ours(tokens(3, 5)), wanted, rtol=1e-9, atol=1e-9)


def test_no_logit_depends_on_later_tokens():
    ours, first = model(), tokens(2, 6)
    second = first.clone()
    second[:, 4:] = (second[:, 4:] + 1) % 11
    torch.testing.assert_close(ours(first)[:, :4], ours(second)[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(ours(first)[:, 4:], ours(second)[:, 4:])


def test_positions_count():
    same = torch.full((1, 6), 3)
    logits = model()(same)[0]
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_head_is_tied_and_weights_start_as_stated():
    ours = model(vocabulary=300, dim=64, depth=8, length=64)
    assert ours.head.weight is ours.tokens.weight
    names = [name for name, _ in ours.named_parameters()]
    assert "head.weight" not in names
    for name, param in ours.named_parameters():
        if param.dim() == 1:
            assert param.unique().tolist() == [1.0 if name.endswith("weight") else 0.0]
            continue
        joins = "out_proj" in name or "mlp.2" in name
        # 4 096 draws or more: the sample's deviation is within 1.1 % in one of two, 5 % always
        assert param.std().item() == pytest.approx(0.02 / (math.sqrt(16) if joins else 1), rel=0.05)


def test_loss_is_the_mean_surprise():
    ours, x, y = model(), tokens(2, 5), tokens(2, 5, seed=1)
    odds = torch.softmax(ours(x), dim=-1)
    surprise = [-math.log(odds[row, place, y[row, place]].item()) for row in range(2) for place in range(5)]
    assert next_token_loss(ours, x, y).item() == pytest.approx(sum(surprise) / 10, rel=1e-10)


@pytest.mark.parametrize("name", ["vocabulary", "dim", "depth", "heads", "length"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        model(**{name: 0})


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="divisible by heads, got 8 and 3"):
        model(heads=3)
    with pytest.raises(ValueError, match="at most 6 a sequence, got 7"):
        model()(tokens(1, 7))
