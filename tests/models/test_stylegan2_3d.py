"""The discriminator of whole clips."""

import pytest
import torch
from real_clips import street_clip

from bsq_ray import config
from bsq_ray.models.discriminators import build_discriminator
from bsq_ray.models.discriminators.stylegan2_3d import ClipBlock, ClipDiscriminator, temporal_downsampling


def small_discriminator(frames=4, size=32):
    torch.manual_seed(0)
    section = config.AdversarialConfig(discriminator="stylegan2-3d", channel_base=256, channel_max=16)
    return build_discriminator(section, size, frames)


def clips(count, frames=4, size=32, seed=0):
    return torch.randn(count, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("frames", "halved"), [(1, 0), (2, 1), (4, 2), (5, 0), (6, 1), (16, 3), (64, 3)])
def test_temporal_downsampling_uses_last_blocks(frames, halved):
    """The last blocks halve the time axis, as often as the number of frames is even."""
    assert temporal_downsampling(frames, 3) == [number >= 3 - halved for number in range(3)]
    assert small_discriminator(frames)(clips(2, frames))[0].shape == (2, 1)


def test_discriminator3d_joint_batches_match_separate_batches():
    """Batches passed in one call get the logits they get in separate calls."""
    model, real, fake = small_discriminator(), clips(4), 3 * clips(8, seed=1)
    together = model(real, fake)
    torch.testing.assert_close(together[0], model(real)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], model(fake)[0], rtol=1e-4, atol=1e-5)
    assert together[0].dtype == torch.float32


def test_discriminator3d_depends_on_frame_order():
    model, clip = small_discriminator(), street_clip(4, 32)
    assert not torch.allclose(model(clip)[0], model(clip.flip(2))[0])


def test_discriminator3d_blocks_preserve_variance():
    torch.manual_seed(0)
    model = ClipDiscriminator(64, 8, 1024, 32)
    clip = street_clip(8, 64)
    x = model.fromrgb(clip / clip.std())
    for block in model.blocks:
        x = block(x)
        assert 0.3 < x.std() < 3


def test_clip_block_gradgradcheck_passes():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ClipBlock(3, 4, downsample_time=True).double(), x, fast_mode=True)


def test_discriminator3d_wrong_length_or_size_raises():
    """Clips of another length and image sizes that are not a power of two are rejected."""
    with pytest.raises(ValueError, match="clips have 2 frames, but this stylegan2-3d discriminator expects 4"):
        small_discriminator()(clips(1, 2))
    with pytest.raises(ValueError, match="power of two.*patchgan"):
        ClipDiscriminator(96, 4, 512, 32)
