"""Metrics measured on a GPU are those measured on a CPU."""

import numpy as np
import pytest
import torch
from small_gpu_models import missing_weights_reason, photo_batch, small_tokenizer

from bsq_ray.data.data_source import SampleBlock
from bsq_ray.data.transforms import to_uint8
from bsq_ray.evaluation.reconstruction.batch_metrics import ReconstructionMetrics
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.evaluation.reconstruction.image_metrics import ImageReconstructionMetrics
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import structural_similarity

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hide_gpu(monkeypatch):
    """Hides the GPU from what looks for one."""

    def hide():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    return hide


class WithoutInception(ImageReconstructionMetrics):
    """Everything of each image, nothing of their distribution."""

    def __init__(self, model_url, weights, total):
        ReconstructionMetrics.__init__(self, model_url, weights, total)

    def features(self, samples):
        return None


def test_psnr_and_ssim_on_gpu_match_cpu(gpu, photos):
    original = photo_batch(photos, 176)
    blurred = torch.nn.functional.avg_pool2d(original, 3, 1, 1)
    on_cpu = structural_similarity(original, blurred) | {"psnr": psnr(original, blurred)}
    pair = original.to(gpu), blurred.to(gpu)
    on_gpu = structural_similarity(*pair) | {"psnr": psnr(*pair)}
    assert on_cpu.keys() == {"ssim", "ms_ssim", "psnr"}
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), value, rtol=1e-4, atol=1e-5, msg=name)


def test_image_metrics_match_cpu(model, photos, gpu, hide_gpu):
    if reason := missing_weights_reason("lpips-alex", "lpips-vgg"):
        pytest.skip(reason)
    pixels = to_uint8(photo_batch(photos)).numpy()
    samples = SampleBlock(pixels, np.zeros(len(pixels), np.int64), [str(n) for n in range(len(pixels))])
    measurer = WithoutInception(model, "ema", len(pixels))
    assert measurer.device.type == gpu.type
    on_gpu = measurer(samples)
    hide_gpu()
    on_cpu = WithoutInception(model, "ema", len(pixels))(samples)
    assert np.array_equal(on_gpu.packed_bits, on_cpu.packed_bits)
    assert on_gpu.seconds > 0
    for row, metrics in on_cpu.metrics.items():
        for name, value in metrics.items():
            np.testing.assert_allclose(on_gpu.metrics[row][name], value, rtol=1e-3, err_msg=f"{row} {name}")


def test_reconstruction_evaluation_on_gpu_matches_cpu(model, held_out_shards, hide_gpu, tmp_path):
    if reason := missing_weights_reason(*ImageReconstructionMetrics.networks):
        pytest.skip(reason)
    rows = [evaluate_reconstruction(model, held_out_shards, str(tmp_path / "gpu"), workers=0)["rows"]]
    hide_gpu()
    rows.append(evaluate_reconstruction(model, held_out_shards, str(tmp_path / "cpu"), workers=0)["rows"])
    for name, metrics in rows[1].items():
        for key, value in metrics.items():
            if key != "images_per_second":
                assert rows[0][name][key] == pytest.approx(value, rel=2e-3, abs=1e-4), (name, key)
