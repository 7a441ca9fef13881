"""Discriminators."""

import pytest
import torch
import torch.nn.functional as F

from bsq_ray import config
from bsq_ray.models.discriminators.stylegan2 import (
    EqualizedConv,
    PatchDiscriminator,
    StyleDiscriminator,
    append_minibatch_stddev,
    build_discriminator,
)


def images(count, size=32, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "base", "parameters"), [(256, 32768, 28_864_129), (128, 32768, 28_389_121), (256, 16384, 24_001_089)]
)
def test_style_discriminator_parameter_count_matches_paper(size, base, parameters):
    with torch.device("meta"):
        model = StyleDiscriminator(size, base, 512)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_build_discriminator_config_selects_kind_and_channels():
    style = build_discriminator(config.AdversarialConfig(channel_base=512, channel_max=32), 32)
    assert style.b32.conv0.weight.shape == (16, 16, 3, 3)
    assert style.b8.conv1.weight.shape == (32, 32, 3, 3)
    patch = build_discriminator(config.AdversarialConfig(discriminator="patchgan", channel_max=96), 32)
    assert isinstance(patch, PatchDiscriminator)
    assert patch(images(2))[0].shape == (2, 1, 2, 2)
    assert max(p.shape[0] for p in patch.parameters()) == 96


def test_style_discriminator_bad_size_suggests_patchgan():
    """An image size that is not a power of two is rejected, and the error suggests PatchGAN."""
    with pytest.raises(ValueError, match="power of two.*patchgan"):
        StyleDiscriminator(96, 512, 32)


@pytest.mark.parametrize("kind", ["stylegan2", "patchgan"])
def test_discriminator_joint_batches_match_separate_batches(kind):
    """Batches passed in one call get the logits they get in separate calls."""
    torch.manual_seed(0)
    model = build_discriminator(config.AdversarialConfig(discriminator=kind, channel_base=512, channel_max=32), 32)
    real, fake = images(4), 3 * images(8, seed=1)
    together = model(real, fake)
    torch.testing.assert_close(together[0], model(real)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], model(fake)[0], rtol=1e-4, atol=1e-5)
    assert together[0].dtype == torch.float32


def test_equalized_conv_downsample_matches_upfirdn():
    """Against the literal upfirdn: zero-pad, filter with the outer product of [1,3,3,1]/8, correlate with stride 2."""
    torch.manual_seed(0)
    conv = EqualizedConv(5, 7, 3, down=True)
    x = torch.randn(2, 5, 16, 16)
    taps = torch.tensor([1.0, 3, 3, 1]) / 8
    padded = F.pad(x, (2, 2, 2, 2)).flatten(0, 1)[:, None]
    blurred = F.conv2d(padded, torch.outer(taps, taps)[None, None]).unflatten(0, (2, 5)).squeeze(2)
    expected = F.leaky_relu(F.conv2d(blurred, conv.weight / (5 * 9) ** 0.5, stride=2), 0.2) * 2**0.5
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    assert conv(x).shape == (2, 7, 8, 8)


def test_style_discriminator_blocks_preserve_variance():
    torch.manual_seed(0)
    model = StyleDiscriminator(64, 4096, 64)
    x = images(8, 64)
    for name in model.block_names:
        x = model.get_submodule(name)(x)
        assert 0.3 < x.std() < 3


def test_minibatch_stddev_depends_on_own_group_only():
    x = torch.randn(8, 2, 4, 4)
    changed = x.clone()
    changed[0] += 5
    is_changed = (append_minibatch_stddev(x)[:, -1] != append_minibatch_stddev(changed)[:, -1]).flatten(1).any(1)
    assert is_changed.tolist() == [True, False] * 4


def test_minibatch_stddev_same_for_any_number_of_ranks():
    """Worker r of 2 holds images r, r + 2, …; its groups are those of the whole batch."""
    x = torch.randn(16, 2, 4, 4)
    whole = append_minibatch_stddev(x)[:, -1]
    torch.testing.assert_close(append_minibatch_stddev(x[1::2])[:, -1], whole[1::2])


def test_style_block_gradgradcheck_passes():
    torch.manual_seed(0)
    model = StyleDiscriminator(8, 64, 8).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(model.b8, x, fast_mode=True)
