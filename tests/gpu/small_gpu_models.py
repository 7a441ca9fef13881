"""Models for the tests on a GPU, what they are shown, and how their results are compared with a CPU's."""

import copy

import numpy as np
import torch

from bsq_ray import Tokenizer, config
from bsq_ray.data.transforms import eval_transform, to_float
from bsq_ray.models.pretrained_weights import resolve_once

SIZE = 32


def small_tokenizer(quantizer=None, **changes):
    """4 x 4 tokens at 32 px; temporal positions that matter, as a trained video model's do."""
    torch.manual_seed(0)
    sizes = {"width": 64, "layers": 2, "heads": 4}
    model_config = {
        "image_size": SIZE,
        "encoder": config.TransformerConfig(**sizes),
        "decoder": config.DecoderConfig(**sizes, head_hidden_dim=64),
        "quantizer": quantizer or config.BSQConfig(bits=18),
    }
    tokenizer = Tokenizer(config.TokenizerModelConfig(**model_config | changes))
    for part in (tokenizer.encoder, tokenizer.decoder):
        if part.transformer.temporal_position is not None:
            torch.nn.init.normal_(part.transformer.temporal_position, std=0.5)
    return tokenizer


def photo_batch(photos, size=SIZE):
    """Square crops of real photos, (B, 3, size, size) in [-1, 1]."""
    return to_float(torch.from_numpy(np.stack([eval_transform(photo, size, "lanczos") for photo in photos])))


def pan(photo, frames, size=SIZE):
    """A clip (1, 3, T, size, size) of a camera that pans over a photo by eight pixels per frame."""
    pixels = np.asarray(photo.resize((size + 8 * frames, size))).transpose(2, 0, 1)
    cuts = [pixels[:, :, 8 * t : 8 * t + size] for t in range(frames)]
    return to_float(torch.from_numpy(np.stack(cuts, 1)[None]))


def cpu_and_gpu_copies(module, gpu):
    """The module on the CPU, and its twin on the GPU."""
    return module, copy.deepcopy(module).to(gpu)


def missing_weights_reason(*networks):
    """Return the reason why published networks are unavailable here; empty if they are available."""
    for network in networks:
        try:
            resolve_once(network)
        except ValueError as error:
            return str(error)
    return ""


def assert_close_to_cpu(actual, expected, tolerance, name=""):
    """Assert that the norm of the difference is at most `tolerance` times the norm of the CPU result."""
    expected, actual = expected.detach().double(), actual.detach().cpu().double()
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all(), name
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-12))
    assert error <= tolerance, f"{name}: {error:.2e} apart"


def assert_same_gradients(actual, reference, tolerance):
    """Compare all gradients; a difference of a thousandth of the largest norm is allowed."""
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    longest = max(float(gradient.norm()) for gradient in expected.values())
    for name, parameter in actual.named_parameters():
        error = float((parameter.grad.cpu() - expected[name]).norm())
        assert error <= tolerance * (float(expected[name].norm()) + 1e-3 * longest), f"{name}: {error:.2e} apart"
