"""Distortion of decoded frames: the mean of each metric over frames, against the metrics themselves."""

import numpy as np
import pytest
import torch

from bsq_ray.data.transforms import to_float
from bsq_ray.evaluation.compression import distortion
from bsq_ray.evaluation.compression.distortion import DistortionMeter
from bsq_ray.metrics.dists import dists
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr


@pytest.fixture(scope="module")
def frames(photos):
    """Ten frames of 48 x 40 pixels: a crop that moves over a photo."""
    pixels = np.asarray(photos[0])
    return np.stack([pixels[8 * t : 8 * t + 40, 8 * t : 8 * t + 48] for t in range(10)])


def damage(frames_THW3, levels):
    noise = np.random.default_rng(0).integers(-levels, levels + 1, frames_THW3.shape)
    return np.clip(frames_THW3 + noise, 0, 255).astype(np.uint8)


def to_batch(frames_THW3):
    return to_float(torch.from_numpy(frames_THW3).permute(0, 3, 1, 2).contiguous())


def test_measure_clip_averages_networks_over_eight_frames(frames):
    """PSNR is the mean over all frames, LPIPS and DISTS over eight of them, the first and the last included."""
    decoded = damage(frames, 40)
    values = DistortionMeter(frames).measure(decoded)
    first, second = to_batch(frames), to_batch(decoded)
    assert values["psnr"] == pytest.approx(psnr(first, second).mean().item())
    chosen = [0, 1, 3, 4, 5, 6, 8, 9]
    assert values["lpips"] == pytest.approx(lpips(first[chosen], second[chosen]).mean().item(), abs=1e-5)
    assert values["dists"] == pytest.approx(dists(first[chosen], second[chosen]).mean().item(), abs=1e-5)
    assert "ms_ssim" not in values, "the frames are too small for it"


@pytest.mark.parametrize("max_pixels", [2**20, 0], ids=["stored features", "features computed again"])
def test_measure_several_codecs_equals_one_by_one(frames, monkeypatch, max_pixels):
    """Stored feature maps of the original do not change the DISTS of any codec."""
    monkeypatch.setattr(distortion, "_MAX_STORED_PIXELS", max_pixels)
    meter = DistortionMeter(frames[:1], ("dists",))
    decoded = [damage(frames[:1], levels) for levels in (10, 60)]
    expected = [dists(to_batch(frames[:1]), to_batch(each)).item() for each in decoded]
    assert [meter.measure(each) for each in decoded] == [{"dists": pytest.approx(each, abs=1e-6)} for each in expected]
    assert expected[0] < expected[1]


def test_measure_omits_metrics_that_are_not_selected_or_defined(frames):
    assert DistortionMeter(frames[:1], ("psnr", "lpips")).measure(frames[:1]).keys() == {"psnr", "lpips"}
    assert DistortionMeter(frames[:1, :16]).measure(frames[:1, :16]).keys() == {"psnr"}
    assert DistortionMeter(frames[:1, :17]).measure(frames[:1, :17]).keys() == {"psnr", "dists"}
