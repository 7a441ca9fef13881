"""LPIPS with its published weights, on real photos."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from bsq_ray.data.transforms import to_float
from bsq_ray.losses.perceptual import PerceptualLoss


def tensor(image):
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


@pytest.fixture(scope="module")
def coffee(photo_folders):
    return Image.open(photo_folders[1] / "coffee.png").resize((256, 256), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def chelsea(photo_folders):
    return Image.open(photo_folders[1] / "chelsea.png").resize((256, 256), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("network", "jpeg", "blurred", "other"), [("alex", 0.1141, 0.5337, 0.7110), ("vgg", 0.2967, 0.4653, 0.7262)]
)
def test_lpips_matches_reference_values(coffee, chelsea, network, jpeg, blurred, other):
    """Values computed with another public implementation of the same weights."""
    loss = PerceptualLoss(network)
    data = io.BytesIO()
    coffee.save(data, "JPEG", quality=20)
    distorted = [Image.open(data), coffee.filter(ImageFilter.GaussianBlur(4)), chelsea]
    values = loss(torch.cat([tensor(image) for image in distorted]), tensor(coffee).expand(3, -1, -1, -1))
    assert values.tolist() == pytest.approx([jpeg, blurred, other], abs=2e-4)


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_perceptual_loss_equals_network_distance(coffee, chelsea, network):
    loss = PerceptualLoss(network)
    a, b = tensor(coffee.resize((64, 64))), tensor(chelsea.resize((64, 64)))
    torch.testing.assert_close(loss(a, b), loss.lpips(a, b), rtol=0, atol=0)


def test_lpips_gradients_reach_reconstruction_only(coffee):
    loss = PerceptualLoss("alex")
    original = tensor(coffee.resize((64, 64))).requires_grad_()
    reconstruction = (original.detach() * 0.9).requires_grad_()
    loss(reconstruction, original).sum().backward()
    assert reconstruction.grad.abs().sum() > 0
    assert original.grad is None
    assert all(p.grad is None for p in loss.parameters())


def test_lpips_bf16_stays_close_to_fp32(coffee, chelsea):
    loss = PerceptualLoss("vgg")
    a, b = tensor(coffee.resize((64, 64))), tensor(chelsea.resize((64, 64)))
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(a, b)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(a, b), rtol=0.03, atol=0.01)
