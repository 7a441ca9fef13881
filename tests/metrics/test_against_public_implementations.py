"""Every metric against a public implementation, on real photos and their distortions."""

import itertools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision_stub import stub_torchvision_ops

from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.metrics.classifier import EfficientNetLite0
from bsq_ray.metrics.dists import dists, load_network
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance, kernel_distance
from bsq_ray.metrics.inception import Inception
from bsq_ray.metrics.inception_score import InceptionScore
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import structural_similarity
from bsq_ray.models.pretrained_weights import resolve_once


@pytest.fixture(scope="module")
def originals(photos):
    return to_float(torch.from_numpy(np.stack([eval_transform(photo, 176, "lanczos") for photo in photos[:6]])))


@pytest.fixture(scope="module")
def distorted(originals):
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(originals, 3, 1, 1)
    return to_float(to_uint8(smooth + 0.1 * noise))


@pytest.fixture(scope="module")
def inception():
    return Inception()


def test_psnr_matches_torchmetrics(originals, distorted):
    stub_torchvision_ops()
    from torchmetrics.functional.image import peak_signal_noise_ratio

    each = psnr(originals, distorted)
    expected = [
        peak_signal_noise_ratio((d + 1) / 2, (o + 1) / 2, data_range=1.0).item()
        for o, d in zip(originals, distorted, strict=True)
    ]
    assert each.tolist() == pytest.approx(expected, rel=1e-5)


def test_psnr_of_identical_images_is_finite(originals):
    assert psnr(originals, originals).tolist() == pytest.approx([100.0] * 6)


def test_ssim_and_ms_ssim_match_pytorch_msssim(originals, distorted):
    from pytorch_msssim import ms_ssim, ssim

    metrics = structural_similarity(originals, distorted)
    a, b = (originals + 1) * 127.5, (distorted + 1) * 127.5
    assert metrics["ssim"].mean().item() == pytest.approx(ssim(a, b, data_range=255).item(), abs=1e-6)
    assert metrics["ms_ssim"].mean().item() == pytest.approx(ms_ssim(a, b, data_range=255).item(), abs=1e-6)


def test_ms_ssim_is_omitted_for_small_images(originals, distorted):
    assert structural_similarity(originals[..., :64, :64], distorted[..., :64, :64]).keys() == {"ssim"}


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_matches_lpips_package(originals, distorted, network):
    stub_torchvision_ops()
    from lpips import LPIPS

    public = LPIPS(net=network, pnet_rand=True, verbose=False)
    weights = resolve_once(f"lpips-{network}").tensors
    convolutions = [module for module in public.net.modules() if isinstance(module, torch.nn.Conv2d)]
    with torch.no_grad():
        for index, convolution in enumerate(convolutions):
            convolution.weight.copy_(weights[f"conv.{index}.weight"])
            convolution.bias.copy_(weights[f"conv.{index}.bias"])
        expected = public(originals, distorted).flatten()
    torch.testing.assert_close(lpips(originals, distorted, network), expected, rtol=0, atol=1e-5)


def test_dists_matches_dists_package(originals, distorted, monkeypatch):
    """The package computes VGG16 of torchvision; here with the same convolutions."""
    stub_torchvision_ops()
    from DISTS_pytorch import DISTS_pt
    from torchvision.models import vgg16

    network = vgg16(weights=None)
    weights = resolve_once("lpips-vgg").tensors
    convolutions = [module for module in network.features if isinstance(module, torch.nn.Conv2d)]
    with torch.no_grad():
        for index, convolution in enumerate(convolutions):
            convolution.weight.copy_(weights[f"conv.{index}.weight"])
            convolution.bias.copy_(weights[f"conv.{index}.bias"])
    monkeypatch.setattr(DISTS_pt.models, "vgg16", lambda pretrained: network)
    public = DISTS_pt.DISTS(load_weights=False)
    heads = torch.load(Path(DISTS_pt.__file__).with_name("weights.pt"), weights_only=True)
    public.alpha.data, public.beta.data = heads["alpha"], heads["beta"]
    first, second = originals[:3, :, :160, :111], distorted[:3, :, :160, :111]
    with torch.no_grad():
        expected = public((first + 1) / 2, (second + 1) / 2)
    torch.testing.assert_close(dists(first, second), expected, rtol=0, atol=1e-5)


def test_dists_of_identical_images_is_zero_and_grows_with_damage(originals):
    first = originals[:2, :, :96, :96]
    blurred = [torch.nn.functional.avg_pool2d(first, side, 1, side // 2) for side in (3, 7, 15)]
    distances = torch.stack([dists(first, image) for image in (first, *blurred)])
    assert distances[0].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert (distances.diff(dim=0) > 0.02).all()
    assert (distances < 1).all()


def test_dists_of_stored_feature_maps_is_the_same(originals, distorted):
    """The feature maps of an original can be compared with several images."""
    network, first = load_network("cpu"), originals[:1, :, :64, :64]
    stored = list(network.feature_maps(first))
    assert [each.shape[1:] for each in stored] == [
        (3, 64, 64), (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)
    ]  # fmt: skip
    for second in (distorted[:1, :, :64, :64], distorted[1:2, :, :64, :64]):
        assert torch.equal(network.distance(stored, network.feature_maps(second)), dists(first, second))


def test_inception_features_match_pytorch_fid(originals, inception, monkeypatch):
    """Features equal those of pytorch-fid with the same weights."""
    stub_torchvision_ops()
    import pytorch_fid.inception as public
    from torchvision.models.inception import BasicConv2d, Inception3

    layout = Inception3(aux_logits=False, init_weights=False).named_modules()
    names = [name for name, module in layout if isinstance(module, BasicConv2d)]
    layers = [module for module in inception.modules() if hasattr(module, "bn")]
    state = {}
    for name, layer in zip(names, layers, strict=True):
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    monkeypatch.setattr(public, "load_state_dict_from_url", lambda *args, **kwargs: state)
    network = public.InceptionV3([3], resize_input=True, normalize_input=True).eval()
    with torch.no_grad():
        [expected] = network((originals + 1) / 2)
    torch.testing.assert_close(inception(originals), expected.flatten(1), rtol=1e-4, atol=1e-5)


def features(count, seed, width=64):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + seed


def statistics(features_ND, first=0):
    """Statistics of images whose keys are consecutive numbers from `first` on."""
    result = FeatureStatistics(features_ND.shape[1])
    result.update(features_ND, [f"{first + n:06}" for n in range(len(features_ND))])
    return result


@pytest.mark.parametrize("count", [30, 500])
def test_frechet_distance_matches_pytorch_fid(count):
    """The distance is correct even for fewer images than features, where the covariance is singular."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    a, b = features(count, 1), features(count, 2)
    expected = calculate_frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(statistics(a), statistics(a)) == pytest.approx(0, abs=1e-6 * expected)


def test_kernel_distance_matches_torchmetrics():
    stub_torchvision_ops()
    from torchmetrics.image.kid import poly_mmd

    a, b = features(40, 1), features(40, 2)
    expected = poly_mmd(torch.from_numpy(a), torch.from_numpy(b), degree=3, gamma=None, coef=1.0)
    assert kernel_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 2500), max_size=5))
def test_kid_subset_is_independent_of_batching(cuts):
    """The subset of more than 2,000 images is random: the images are sorted, so the first ones would be biased."""
    features_ND = np.sort(np.random.default_rng(0).normal(size=(2500, 4)), 0)
    whole, gathered = statistics(features_ND), FeatureStatistics(4)
    for start, end in itertools.pairwise([0, *sorted(cuts), 2500]):
        gathered.update(features_ND[start:end], [f"{n:06}" for n in range(start, end)])
    assert len(whole.kid_subset()) == 2000
    assert np.array_equal(gathered.kid_subset(), whole.kid_subset())
    assert np.allclose(gathered.mean(), whole.mean())
    assert np.allclose(gathered.covariance(), whole.covariance())
    assert abs(whole.kid_subset().mean() - features_ND.mean()) < 0.05


def inception_score(*parts):
    score = InceptionScore()
    for part in parts:
        score.update(part)
    return score.compute()


def test_inception_score_matches_torch_fidelity():
    """The score of the whole set and of its parts is the published one."""
    stub_torchvision_ops()
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.from_numpy(features(80, 3)) / 10
    public = isc_features_to_metric(logits, splits=1, shuffle=False)
    for parts in ([logits.numpy()], [logits.numpy()[:7], logits.numpy()[7:]]):
        assert inception_score(*parts) == pytest.approx(public["inception_score_mean"], rel=1e-6)
    uniform, certain = np.zeros((9, 5)), np.eye(5) * 2000
    assert inception_score(uniform) == pytest.approx(1)
    assert inception_score(certain) == pytest.approx(5), "classes of probability 0 have no effect"


def test_classifier_recognizes_imagenet_photos():
    """At least 17 of 20 ImageNet photos have the correct class, and 19 have it among the five best."""
    folder = Path(find_spec("foolbox").submodule_search_locations[0]) / "data"
    paths = sorted(folder.glob("imagenet_*.jpg"))
    images = np.stack([eval_transform(Image.open(path).convert("RGB"), 224, "lanczos") for path in paths])
    classes = torch.tensor([int(path.stem.split("_")[-1]) for path in paths])
    network = EfficientNetLite0()
    features_BC = network(to_float(torch.from_numpy(images)))
    assert features_BC.shape == (20, 1280)
    best = network.logits(features_BC).topk(5).indices
    assert (best[:, 0] == classes).sum() >= 17
    assert (best == classes[:, None]).any(1).sum() >= 19


def test_distribution_metrics_too_few_images_raise():
    with pytest.raises(ValueError, match="at least two images"):
        inception_score(np.zeros((1, 5)))
    with pytest.raises(ValueError, match="at least two images"):
        frechet_distance(statistics(features(1, 0)), statistics(features(5, 1)))
    with pytest.raises(ValueError, match="at least two images"):
        kernel_distance(features(1, 0), features(5, 1))
