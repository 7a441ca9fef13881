"""Adversarial losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bsq_ray.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, r1_penalty


@pytest.mark.parametrize("objective", ["non_saturating", "hinge"])
def test_losses_have_expected_sign(objective):
    """The generator loss falls with high logits, and the discriminator loss falls when real and fake are
    separated.
    """
    low, high = torch.full((4, 1), -2.0), torch.full((4, 1), 2.0)
    assert generator_loss(high, objective) < generator_loss(low, objective)
    assert discriminator_loss(high, low, objective) < discriminator_loss(low, high, objective)


def test_losses_match_published_formulas():
    logits = torch.tensor([[0.5], [-1.5]])
    assert generator_loss(logits, "non_saturating") == F.softplus(-logits).mean()
    assert generator_loss(logits, "hinge") == 0.5
    expected = 0.5 * (F.softplus(-logits).mean() + F.softplus(logits).mean())
    assert discriminator_loss(logits, logits, "non_saturating") == expected
    assert discriminator_loss(logits, logits, "hinge") == 0.5 * ((0.5 + 2.5) / 2 + (1.5 + 0) / 2)


@pytest.mark.parametrize("objective", ["non_saturating", "hinge"])
def test_heads_have_equal_weights_for_any_number_of_logits(objective):
    """A head with one logit counts as much as one with a hundred."""
    many, one = torch.randn(4, 100), torch.randn(4, 1)
    for loss in (generator_loss, lambda logits, objective: discriminator_loss(logits, logits, objective)):
        expected = (loss(many, objective) + loss(one, objective)) / 2
        torch.testing.assert_close(loss((many, one), objective), expected)


def test_r1_penalty_of_heads_is_that_of_their_mean():
    weights = torch.randn(2, 3 * 4 * 4)
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    first, second = (x.flatten(1) @ weight for weight in weights)
    # The second head has seven equal logits.
    penalty = r1_penalty((first[:, None], second[:, None].expand(-1, 7)), x)
    torch.testing.assert_close(penalty, weights.mean(0).square().sum())


def test_r1_penalty_linear_is_squared_weight():
    """The R1 penalty of a linear discriminator is the squared norm of its weight."""
    weight = torch.randn(3 * 4 * 4)
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = r1_penalty(x.flatten(1) @ weight, x)
    torch.testing.assert_close(penalty, weight.square().sum())


def test_adaptive_weight_is_gradient_norm_ratio():
    layer = nn.Linear(3, 2)
    y = layer(torch.randn(7, 3)).sum()
    assert adaptive_weight(6 * y, 2 * y, layer.weight).item() == pytest.approx(3, rel=1e-3)
    assert adaptive_weight(6 * y, 0 * y, layer.weight).item() == 1e4
