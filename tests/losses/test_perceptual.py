"""LPIPS with its published weights and the texture loss on its features, on real photos."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from bsq_ray.data.transforms import to_float
from bsq_ray.losses.perceptual import PerceptualLoss, gram_distance


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
    torch.testing.assert_close(loss(a, b), loss.networks[0](a, b), rtol=0, atol=0)


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


# Texture loss


@pytest.fixture(scope="module")
def pairs(coffee, chelsea):
    """(reconstruction, original): two blurred photos and the photos, 48 px."""
    originals = [image.resize((48, 48)) for image in (coffee, chelsea)]
    blurred = [image.filter(ImageFilter.GaussianBlur(1)) for image in originals]
    return torch.cat([tensor(image) for image in blurred]), torch.cat([tensor(image) for image in originals])


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_gram_distance_matches_sums_over_positions(pairs, network):
    """Each element of a Gram matrix is the mean product of two channels of the unnormalized features."""
    loss = PerceptualLoss(network)
    _, distance_B = loss.with_texture(*pairs)
    maps = [[np.float64(map_BCHW.detach()) for map_BCHW in loss.networks[0].feature_maps(images)] for images in pairs]
    for index, distance in enumerate(distance_B.tolist()):
        expected = 0.0
        for first, second in zip(*maps, strict=True):
            first_gram, second_gram = (
                np.einsum("chw,dhw->cd", features[index], features[index]) / features[index].size
                for features in (first, second)
            )
            expected += np.mean((first_gram - second_gram) ** 2)
        assert distance == pytest.approx(expected, rel=1e-4)


def test_gram_distance_gradient_matches_finite_differences(pairs):
    """In fp64, through the network to the pixels, along random directions."""
    network = PerceptualLoss("alex").networks[0].double()
    reconstruction, original = (images.double() for images in pairs)
    original_maps = network.feature_maps(original)

    def distance(images):
        return gram_distance(network.feature_maps(images), original_maps).sum()

    images = reconstruction.clone().requires_grad_()
    [gradient] = torch.autograd.grad(distance(images), images)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        step = 1e-8 * direction
        difference = (distance(reconstruction + step) - distance(reconstruction - step)) / 2e-8
        assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-5)


def test_gram_distance_passes_gradcheck():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda maps: gram_distance([maps], [second]), first.requires_grad_())


def test_gram_distance_ignores_positions(pairs):
    """Moving the features of an image to other positions changes no texture."""
    maps = PerceptualLoss("alex").networks[0].feature_maps(pairs[0])
    moved = [map_BCHW.flip(3).roll(1, 2) for map_BCHW in maps]
    torch.testing.assert_close(gram_distance(maps, moved), torch.zeros(2), rtol=0, atol=1e-9)
    assert (gram_distance(maps, [2 * map_BCHW for map_BCHW in maps]) > 1e-6).all()


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_texture_leaves_lpips_unchanged(pairs, network):
    """LPIPS and its gradient are bit-identical with and without the texture loss."""
    loss, results = PerceptualLoss(network), []
    for method in (loss.forward, lambda *images: loss.with_texture(*images)[0]):
        images = pairs[0].clone().requires_grad_()
        values = method(images, pairs[1])
        results.append((values, torch.autograd.grad(values.sum(), images)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_texture_runs_network_once_per_image(pairs):
    loss, num_calls = PerceptualLoss("alex"), 0

    def count(*_):
        nonlocal num_calls
        num_calls += 1

    loss.networks[0].trunk[0].register_forward_hook(count)
    loss.with_texture(*pairs)
    assert num_calls == 2


def test_gram_distance_bf16_stays_close_to_fp32(pairs):
    loss = PerceptualLoss("vgg")
    with torch.autocast("cpu", torch.bfloat16):
        _, half_B = loss.with_texture(*pairs)
    assert half_B.dtype == torch.float32
    torch.testing.assert_close(half_B, loss.with_texture(*pairs)[1], rtol=0.1, atol=0)


def test_mean_of_both_networks(pairs):
    """With both networks, LPIPS and texture loss are the means of their values with each."""
    both = PerceptualLoss("alex", "vgg")
    first, second = pairs
    for measure in (PerceptualLoss.forward, lambda loss, *images: torch.stack(loss.with_texture(*images))):
        each = [measure(PerceptualLoss(network), first, second) for network in ("alex", "vgg")]
        torch.testing.assert_close(measure(both, first, second), sum(each) / 2)
