"""Models and losses on a GPU calculate what they calculate on a CPU: fp32 on both, no TF32, sums in another order.

Values agree to 1e-4 of their length, gradients to 1e-3. A bit whose coordinate is within rounding of zero could differ;
among the few thousand of these tests there is none.
"""

import pytest
import torch
from small_gpu_models import (
    assert_close_to_cpu,
    assert_same_gradients,
    cpu_and_gpu_copies,
    missing_weights_reason,
    pan,
    photo_batch,
    small_tokenizer,
)

from bsq_ray import config
from bsq_ray.losses.adversarial import r1_penalty
from bsq_ray.losses.perceptual import PerceptualLoss
from bsq_ray.models.discriminators import build_discriminator
from bsq_ray.models.ops.blur import _load_kernels, blur
from bsq_ray.models.quantizers import build_quantizer
from bsq_ray.models.tokenizer import Tokens

pytestmark = pytest.mark.gpu
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3

QUANTIZERS = {
    "bsq": config.BSQConfig(bits=18),
    "bsq, groups of 9": config.BSQConfig(bits=18, entropy=config.EntropyConfig(estimate="group", group_size=9)),
    "bsq with commitment": config.BSQConfig(bits=36, commitment_weight=0.25),
    "lfq": config.LFQConfig(bits=18),
    "fsq": config.FSQConfig(kind="fsq", levels=(8, 8, 5, 5)),
    "vq": config.VQConfig(kind="vq", codebook_size=256),
    "vq, not normalized": config.VQConfig(kind="vq", codebook_size=256, l2_normalize=False),
}


def training_step(tokenizer, images):
    """The output, after the gradients of a loss through decoder, quantizer and encoder."""
    output = tokenizer(images)
    loss = (output.images - images).square().mean() + 0.1 * output.quantized.loss
    loss.backward()
    return output


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_tokenizer_outputs_and_gradients_match_cpu(kind, gpu, photos):
    on_cpu, on_gpu = cpu_and_gpu_copies(small_tokenizer(QUANTIZERS[kind]), gpu)
    images = photo_batch(photos)
    expected, actual = training_step(on_cpu, images), training_step(on_gpu, images.to(gpu))
    assert torch.equal(actual.quantized.bits_BNL.cpu(), expected.quantized.bits_BNL)
    assert_close_to_cpu(actual.images, expected.images, VALUE_TOLERANCE, "images")
    assert_close_to_cpu(actual.quantized.loss, expected.quantized.loss, VALUE_TOLERANCE, "penalty")
    for name, value in expected.quantized.stats.items():
        assert_close_to_cpu(actual.quantized.stats[name], value, VALUE_TOLERANCE, name)
    assert_same_gradients(on_gpu, on_cpu, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_dequantize_on_gpu_returns_the_forward_codes(kind, gpu):
    quantizer = build_quantizer(QUANTIZERS[kind]).to(gpu)
    result = quantizer(torch.randn(4, 64, quantizer.channels, generator=torch.Generator().manual_seed(0)).to(gpu))
    assert result.codes_BNC.device.type == result.bits_BNL.device.type == gpu.type
    assert torch.equal(result.codes_BNC, quantizer.dequantize(result.bits_BNL))


def test_tokenizer_bf16_keeps_quantization_in_fp32(gpu, photos):
    on_cpu, on_gpu = cpu_and_gpu_copies(small_tokenizer(), gpu)
    images = photo_batch(photos)
    with torch.autocast(gpu.type, torch.bfloat16):
        actual = training_step(on_gpu, images.to(gpu))
    assert {t.dtype for t in (actual.images, actual.quantized.codes_BNC, actual.quantized.loss)} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in on_gpu.parameters())
    assert_close_to_cpu(
        actual.images, training_step(on_cpu, images).images, 0.2, "images, but for bits that bf16 has turned"
    )


@pytest.mark.parametrize("kind", ["stylegan2", "patchgan", "stylegan2-3d"])
def test_discriminator_logits_and_r1_gradients_match_cpu(kind, gpu, photos):
    adversarial_config = config.AdversarialConfig(discriminator=kind, channel_base=1024, channel_max=32)
    torch.manual_seed(0)
    uses_clips = kind == "stylegan2-3d"
    on_cpu, on_gpu = cpu_and_gpu_copies(build_discriminator(adversarial_config, 32, 4 if uses_clips else 1), gpu)
    images = torch.cat([pan(photo, 4) for photo in photos[:4]]) if uses_clips else photo_batch(photos[:8])
    for module, device in ((on_cpu, "cpu"), (on_gpu, gpu)):
        real = images.to(device).requires_grad_()
        [logits] = module(real)
        (logits.square().mean() + r1_penalty(logits, real)).backward()
    assert_close_to_cpu(on_gpu(images.to(gpu))[0], on_cpu(images)[0], VALUE_TOLERANCE, "logits")
    assert_same_gradients(on_gpu, on_cpu, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 70, 20, 36), (1, 256, 8, 16)], ids=str)
@pytest.mark.parametrize(("stride", "pad"), [(1, 2), (2, 1)], ids=["before a stride", "with the stride"])
def test_blur_kernels_and_derivatives_match_cpu(stride, pad, shape, gpu):
    assert _load_kernels(gpu) is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", gpu):
        image = x.to(device, copy=True).requires_grad_()
        filtered = blur(image, stride, pad)
        [gradient] = torch.autograd.grad(filtered.pow(3).sum(), image, create_graph=True)
        gradient.square().sum().backward()
        results.append((filtered, gradient, image.grad))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)
    half = x.to(gpu, torch.bfloat16)
    exact = blur(half.float(), stride, pad)
    torch.testing.assert_close(blur(half, stride, pad).float(), exact.bfloat16().float(), rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_and_gradient_match_cpu(network, gpu, photos):
    if reason := missing_weights_reason(f"lpips-{network}"):
        pytest.skip(reason)
    on_cpu, on_gpu = cpu_and_gpu_copies(PerceptualLoss(network), gpu)
    original = photo_batch(photos, 64)
    blurred = torch.nn.functional.avg_pool2d(original, 3, 1, 1)
    results = []
    for module, device in ((on_cpu, "cpu"), (on_gpu, gpu)):
        reconstruction = blurred.to(device, copy=True).requires_grad_()
        distance = module(reconstruction, original.to(device))
        distance.sum().backward()
        results.append((distance, reconstruction.grad.cpu()))
    assert_close_to_cpu(results[1][0], results[0][0], VALUE_TOLERANCE, "distance")
    assert_close_to_cpu(results[1][1], results[0][1], 1e-2, "gradient")


@pytest.mark.parametrize("causal", [True, False])
def test_video_tokenizer_matches_cpu(causal, gpu, photos):
    on_cpu, on_gpu = cpu_and_gpu_copies(small_tokenizer(frames=4, causal=causal), gpu)
    clips = torch.cat([pan(photo, 4) for photo in photos[:4]])
    expected, actual = training_step(on_cpu, clips), training_step(on_gpu, clips.to(gpu))
    assert torch.equal(actual.quantized.bits_BNL.cpu(), expected.quantized.bits_BNL)
    assert_close_to_cpu(actual.images, expected.images, VALUE_TOLERANCE, "frames")
    assert_same_gradients(on_gpu, on_cpu, GRADIENT_TOLERANCE)


def test_causal_tokenizer_on_gpu_ignores_later_frames(gpu, photos):
    tokenizer, clip = small_tokenizer(frames=4).to(gpu).eval(), pan(photos[0], 4).to(gpu)
    other = clip.clone()
    other[:, :, 2:] = -other[:, :, 2:]
    bits, changed = (tokenizer.encode(frames).bits_BNL[:, : 2 * 16] for frames in (clip, other))
    assert torch.equal(bits, changed)


@pytest.mark.parametrize("cuts", [[1] * 4, [3, 1]], ids=str)
def test_stream_on_gpu_matches_single_pass(cuts, gpu, photos):
    tokenizer, clip = small_tokenizer(frames=4).to(gpu).eval(), pan(photos[0], 4).to(gpu)
    whole = tokenizer.encode(clip)
    bits = torch.cat([part.bits_BNL for part in tokenizer.encode_stream(iter(clip.split(cuts, 2)))], 1)
    assert torch.equal(bits, whole.bits_BNL)
    parts = whole.bits_BNL.split([16 * frames for frames in cuts], 1)
    tokens = [Tokens(part, (frames, 4, 4)) for part, frames in zip(parts, cuts, strict=True)]
    pixels = torch.cat(list(tokenizer.decode_stream(iter(tokens))), 2)
    assert_close_to_cpu(pixels, tokenizer.decode(whole).cpu(), VALUE_TOLERANCE, "frames")


def test_gradient_checkpointing_halves_peak_memory(gpu, photos):
    """Gradient checkpointing takes less than half the peak memory and gives the same gradients."""
    sizes = {"width": 128, "layers": 6, "heads": 4}
    bodies = {
        "encoder": config.TransformerConfig(**sizes),
        "decoder": config.DecoderConfig(**sizes, head_hidden_dim=128),
    }
    images = photo_batch(photos, 128).to(gpu)
    modules, peaks = [], []
    for is_enabled in (False, True):
        module = small_tokenizer(image_size=128, gradient_checkpointing=is_enabled, **bodies).to(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        allocated_before = torch.cuda.memory_allocated(gpu)
        training_step(module, images)
        peaks.append(torch.cuda.max_memory_allocated(gpu) - allocated_before)
        modules.append(module.cpu())
    assert peaks[1] < 0.5 * peaks[0], f"{peaks[1] / 1e6:.0f} MB instead of {peaks[0] / 1e6:.0f} MB"
    assert_same_gradients(modules[1], modules[0], GRADIENT_TOLERANCE)
