"""Models and losses on a GPU calculate what they calculate on a CPU: fp32 on both, no TF32, sums in another order.

Values agree to 1e-4 of their length, gradients to 1e-3. A bit whose coordinate is within rounding of zero could differ;
among the few thousand of these tests there is none.
"""

import pytest
import torch
from small_gpu_models import (
    assert_agree,
    assert_same_gradients,
    missing_weights,
    on_both,
    pan,
    photographs,
    small_tokenizer,
)

from bsq_ray import config
from bsq_ray.losses.adversarial import r1_penalty
from bsq_ray.losses.perceptual import PerceptualLoss
from bsq_ray.models.discriminators.stylegan2 import build_discriminator
from bsq_ray.models.ops.blur import _kernels, blur
from bsq_ray.models.quantizers import build_quantizer
from bsq_ray.models.tokenizer import Tokens

pytestmark = pytest.mark.gpu
VALUES, GRADIENTS = 1e-4, 1e-3

QUANTIZERS = {
    "bsq": config.BSQ(bits=18),
    "bsq, groups of 9": config.BSQ(bits=18, entropy=config.Entropy(estimate="group", group_size=9)),
    "bsq with commitment": config.BSQ(bits=36, commit_weight=0.25),
    "lfq": config.LFQ(bits=18),
    "fsq": config.FSQ(kind="fsq", levels=(8, 8, 5, 5)),
    "vq": config.VQ(kind="vq", codebook_size=256),
    "vq, not normalised": config.VQ(kind="vq", codebook_size=256, normalised=False),
}


def step(tokenizer, images):
    """The output, after the gradients of a loss through decoder, quantiser and encoder."""
    output = tokenizer(images)
    loss = (output.images - images).square().mean() + 0.1 * output.quantized.loss
    loss.backward()
    return output


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_tokenizers_images_losses_and_gradients(kind, gpu, photos):
    here, there = on_both(small_tokenizer(QUANTIZERS[kind]), gpu)
    images = photographs(photos)
    expected, found = step(here, images), step(there, images.to(gpu))
    assert torch.equal(found.quantized.bits_BNL.cpu(), expected.quantized.bits_BNL)
    assert_agree(found.images, expected.images, VALUES, "images")
    assert_agree(found.quantized.loss, expected.quantized.loss, VALUES, "penalty")
    for name, value in expected.quantized.stats.items():
        assert_agree(found.quantized.stats[name], value, VALUES, name)
    assert_same_gradients(there, here, GRADIENTS)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_bits_name_the_codes_that_the_forward_pass_returned(kind, gpu):
    quantizer = build_quantizer(QUANTIZERS[kind]).to(gpu)
    found = quantizer(torch.randn(4, 64, quantizer.channels, generator=torch.Generator().manual_seed(0)).to(gpu))
    assert found.codes_BNC.device.type == found.bits_BNL.device.type == gpu.type
    assert torch.equal(found.codes_BNC, quantizer.codes(found.bits_BNL))


def test_under_bf16_quantisation_and_losses_stay_fp32(gpu, photos):
    here, there = on_both(small_tokenizer(), gpu)
    images = photographs(photos)
    with torch.autocast(gpu.type, torch.bfloat16):
        found = step(there, images.to(gpu))
    assert {t.dtype for t in (found.images, found.quantized.codes_BNC, found.quantized.loss)} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in there.parameters())
    assert_agree(found.images, step(here, images).images, 0.2, "images, but for bits that bf16 has turned")


@pytest.mark.parametrize("kind", ["stylegan2", "patchgan", "stylegan2-3d"])
def test_a_discriminators_logits_and_the_r1_penaltys_gradients(kind, gpu, photos):
    section = config.Adversarial(discriminator=kind, channel_base=1024, channel_max=32)
    torch.manual_seed(0)
    clips = kind == "stylegan2-3d"
    here, there = on_both(build_discriminator(section, 32, 4 if clips else 1), gpu)
    images = torch.cat([pan(photo, 4) for photo in photos[:4]]) if clips else photographs(photos[:8])
    for module, device in ((here, "cpu"), (there, gpu)):
        real = images.to(device).requires_grad_()
        [logits] = module(real)
        (logits.square().mean() + r1_penalty(logits, real)).backward()
    assert_agree(there(images.to(gpu))[0], here(images)[0], VALUES, "logits")
    assert_same_gradients(there, here, GRADIENTS)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 70, 20, 36), (1, 256, 8, 16)], ids=str)
@pytest.mark.parametrize(("stride", "pad"), [(1, 2), (2, 1)], ids=["before a stride", "with the stride"])
def test_the_filters_kernels_and_their_derivatives(stride, pad, shape, gpu):
    assert _kernels(gpu) is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", gpu):
        image = x.to(device, copy=True).requires_grad_()
        filtered = blur(image, stride, pad)
        [gradient] = torch.autograd.grad(filtered.pow(3).sum(), image, create_graph=True)
        gradient.square().sum().backward()
        results.append((filtered, gradient, image.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    half = x.to(gpu, torch.bfloat16)
    exact = blur(half.float(), stride, pad)
    torch.testing.assert_close(blur(half, stride, pad).float(), exact.bfloat16().float(), rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_and_its_gradient(network, gpu, photos):
    if reason := missing_weights(f"lpips-{network}"):
        pytest.skip(reason)
    here, there = on_both(PerceptualLoss(network), gpu)
    original = photographs(photos, 64)
    blurred = torch.nn.functional.avg_pool2d(original, 3, 1, 1)
    found = []
    for module, device in ((here, "cpu"), (there, gpu)):
        reconstruction = blurred.to(device, copy=True).requires_grad_()
        distance = module(reconstruction, original.to(device))
        distance.sum().backward()
        found.append((distance, reconstruction.grad.cpu()))
    assert_agree(found[1][0], found[0][0], VALUES, "distance")
    assert_agree(found[1][1], found[0][1], 1e-2, "gradient")


@pytest.mark.parametrize("causal", [True, False])
def test_clips_are_seen_as_on_a_cpu(causal, gpu, photos):
    here, there = on_both(small_tokenizer(frames=4, causal=causal), gpu)
    clips = torch.cat([pan(photo, 4) for photo in photos[:4]])
    expected, found = step(here, clips), step(there, clips.to(gpu))
    assert torch.equal(found.quantized.bits_BNL.cpu(), expected.quantized.bits_BNL)
    assert_agree(found.images, expected.images, VALUES, "frames")
    assert_same_gradients(there, here, GRADIENTS)


def test_no_frame_sees_a_later_one(gpu, photos):
    tokenizer, clip = small_tokenizer(frames=4).to(gpu).eval(), pan(photos[0], 4).to(gpu)
    other = clip.clone()
    other[:, :, 2:] = -other[:, :, 2:]
    bits, changed = (tokenizer.encode(frames).bits_BNL[:, : 2 * 16] for frames in (clip, other))
    assert torch.equal(bits, changed)


@pytest.mark.parametrize("cuts", [[1] * 4, [3, 1]], ids=str)
def test_a_streamed_clip_is_that_of_one_pass(cuts, gpu, photos):
    tokenizer, clip = small_tokenizer(frames=4).to(gpu).eval(), pan(photos[0], 4).to(gpu)
    whole = tokenizer.encode(clip)
    bits = torch.cat([part.bits_BNL for part in tokenizer.encode_stream(iter(clip.split(cuts, 2)))], 1)
    assert torch.equal(bits, whole.bits_BNL)
    parts = whole.bits_BNL.split([16 * frames for frames in cuts], 1)
    tokens = [Tokens(part, (frames, 4, 4)) for part, frames in zip(parts, cuts, strict=True)]
    pixels = torch.cat(list(tokenizer.decode_stream(iter(tokens))), 2)
    assert_agree(pixels, tokenizer.decode(whole).cpu(), VALUES, "frames")


def test_gradient_checkpointing_takes_less_memory_and_gives_the_same_gradients(gpu, photos):
    sizes = {"width": 128, "layers": 6, "heads": 4}
    bodies = {"encoder": config.Transformer(**sizes), "decoder": config.Decoder(**sizes, head_width=128)}
    images = photographs(photos, 128).to(gpu)
    modules, peaks = [], []
    for less in (False, True):
        module = small_tokenizer(image_size=128, gradient_checkpointing=less, **bodies).to(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        step(module, images)
        peaks.append(torch.cuda.max_memory_allocated(gpu) - before)
        modules.append(module.cpu())
    assert peaks[1] < 0.5 * peaks[0], f"{peaks[1] / 1e6:.0f} MB instead of {peaks[0] / 1e6:.0f} MB"
    assert_same_gradients(modules[1], modules[0], GRADIENTS)
