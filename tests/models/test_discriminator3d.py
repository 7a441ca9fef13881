"""The discriminator of whole clips."""

import pytest
import torch
from real_clips import street_clip

from bsq_ray import config
from bsq_ray.models.discriminators.stylegan2 import build_discriminator
from bsq_ray.models.discriminators.stylegan2_3d import ClipBlock, ClipDiscriminator, time_halvings


def small(frames=4, size=32):
    torch.manual_seed(0)
    section = config.Adversarial(discriminator="stylegan2-3d", channel_base=256, channel_max=16)
    return build_discriminator(section, size, frames)


def clips(count, frames=4, size=32, seed=0):
    return torch.randn(count, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("frames", "halved"), [(1, 0), (2, 1), (4, 2), (5, 0), (6, 1), (16, 3), (64, 3)])
def test_time_is_halved_by_the_last_blocks_as_often_as_it_is_even(frames, halved):
    assert time_halvings(frames, 3) == [number >= 3 - halved for number in range(3)]
    assert small(frames)(clips(2, frames))[0].shape == (2, 1)


def test_batches_given_together_get_the_logits_they_get_alone():
    model, real, fake = small(), clips(4), 3 * clips(8, seed=1)
    together = model(real, fake)
    torch.testing.assert_close(together[0], model(real)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], model(fake)[0], rtol=1e-4, atol=1e-5)
    assert together[0].dtype == torch.float32


def test_the_order_of_the_frames_matters():
    model, clip = small(), street_clip(4, 32)
    assert not torch.allclose(model(clip)[0], model(clip.flip(2))[0])


def test_signal_keeps_its_scale_through_the_network():
    torch.manual_seed(0)
    model = ClipDiscriminator(64, 8, 1024, 32)
    clip = street_clip(8, 64)
    x = model.fromrgb(clip / clip.std())
    for block in model.blocks:
        x = block(x)
        assert 0.3 < x.std() < 3


def test_gradient_penalty_can_be_differentiated_twice():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ClipBlock(3, 4, shorten=True).double(), x, fast_mode=True)


def test_clips_of_another_length_and_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="takes clips of 4 frames, not 2"):
        small()(clips(1, 2))
    with pytest.raises(ValueError, match="power of two.*patchgan"):
        ClipDiscriminator(96, 4, 512, 32)
