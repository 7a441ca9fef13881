"""What the formulas say is kept for the backward pass, against what PyTorch really keeps."""

import pytest
import torch

from bsq_ray.config import load_config
from bsq_ray.losses.perceptual import PerceptualLoss
from bsq_ray.models.discriminators.stylegan2 import build_discriminator
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.planning.activations import (
    discriminator_activation_bytes,
    perceptual_activation_bytes,
    tokenizer_activation_bytes,
)
from bsq_ray.planning.memory import training_memory

IMAGES = 4


def saved_tensor_bytes(forward, module, copies):
    """Bytes of distinct storages saved by `forward`, less the module's own weights and `copies` bytes of theirs."""
    own = {value.untyped_storage().data_ptr() for value in module.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    saved_bytes = sum(storage.nbytes() for storage in storages.values()) - copies
    assert result is not None
    return saved_bytes


def cases(*more):
    return pytest.mark.parametrize("overrides", [[], *more])


def random_images(size, frames=1):
    shape = (IMAGES, 3, size, size) if frames == 1 else (IMAGES, 3, frames, size, size)
    return torch.rand(shape) * 2 - 1


def autocast(half):
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


@pytest.mark.parametrize("half", [True, False])
@cases(
    ["model.quantizer.bits=36", "model.encoder.mlp_ratio=2"],
    ["model.image_size=128"],
    ["model.frames=4"],
    ["model.frames=4", "model.causal=false"],
)
def test_tokenizer_activation_bytes_within_five_percent(overrides, half, fused_attention):
    """The formula is within five percent of the bytes that PyTorch saves for the tokenizer's backward pass."""
    model = load_config("demo", overrides).model
    tokenizer, images_BCHW = Tokenizer(model), random_images(model.image_size, model.frames)

    def forward():
        with autocast(half):
            output = tokenizer(images_BCHW)
            return (output.images - images_BCHW).abs().mean() + output.quantized.loss, output.images.clamp(-1, 1)

    copies = 2 * sum(value.numel() for value in tokenizer.parameters()) if half else 0
    saved_bytes = saved_tensor_bytes(forward, tokenizer, copies)
    assert tokenizer_activation_bytes(model, half) == pytest.approx(saved_bytes / IMAGES, rel=0.05)


@pytest.mark.parametrize("half", [True, False])
@cases(["model.image_size=128", "loss.adversarial.channel_base=8192"], ["loss.adversarial.discriminator=patchgan"])
def test_discriminator_activation_bytes_within_ten_percent(overrides, half):
    """The formula is within ten percent of the bytes that PyTorch saves for the discriminator's backward pass."""
    run = load_config("demo", overrides)
    adversarial, size = run.loss.adversarial, run.model.image_size
    discriminator, images_BCHW = build_discriminator(adversarial, size), random_images(size).requires_grad_()

    def forward():
        with autocast(half):
            return discriminator(images_BCHW)

    weights = sum(value.numel() for value in discriminator.parameters())
    # Equalised weights are computed, so fp32 keeps a copy of them as well.
    copies = 2 * weights if half else 4 * weights * (adversarial.discriminator == "stylegan2")
    saved_bytes = saved_tensor_bytes(forward, discriminator, copies)
    assert discriminator_activation_bytes(adversarial, size, half) == pytest.approx(saved_bytes / IMAGES, rel=0.1)


@pytest.mark.parametrize("frames", [4, 5])
def test_clip_discriminator_bytes_within_ten_percent(frames):
    """The formula is within ten percent of the bytes that PyTorch saves for the clip discriminator's backward
    pass.
    """
    overrides = [f"model.frames={frames}", "loss.adversarial.discriminator=stylegan2-3d"]
    adversarial = load_config("demo", overrides).loss.adversarial
    discriminator, clips = build_discriminator(adversarial, 64, frames), random_images(64, frames).requires_grad_()
    weights = sum(value.numel() for value in discriminator.parameters())
    # In fp32 alone: half precision on a CPU averages in fp32, on a GPU it does not.
    saved_bytes = saved_tensor_bytes(lambda: discriminator(clips), discriminator, 4 * weights)
    assert discriminator_activation_bytes(adversarial, 64, False, frames) == pytest.approx(
        saved_bytes / IMAGES, rel=0.1
    )


@pytest.mark.parametrize("half", [True, False])
@cases(["loss.perceptual_network=vgg"])
def test_lpips_activation_bytes_within_five_percent(overrides, half):
    loss = load_config("demo", overrides).loss
    network, original = PerceptualLoss(loss.perceptual_network), random_images(64)
    reconstruction = random_images(64).requires_grad_()

    def forward():
        with autocast(half):
            return network(reconstruction, original)

    copies = 2 * sum(value.numel() for value in network.lpips.net.parameters()) if half else 0
    saved_bytes = saved_tensor_bytes(forward, network, copies)
    assert perceptual_activation_bytes(loss, 64, half) == pytest.approx(saved_bytes / IMAGES, rel=0.05)


def test_zero_partitions_more_state_at_each_stage():
    stages = [training_memory(load_config("demo", [f"training.engine.zero_stage={s}"]), 4, 4) for s in range(4)]
    none, optimizer, gradients, weights = stages
    # Two moments on every worker, against two moments and ZeRO's own weights on four.
    assert optimizer.optimizer == none.optimizer * 3 / 8
    assert gradients.gradients == none.gradients / 4
    assert weights.weights < gradients.weights == none.weights


def test_offloaded_optimizer_uses_no_gpu_memory():
    resident, offloaded = (
        training_memory(load_config("demo", [f"training.engine.offload_optimizer={value}"]), 4, 4)
        for value in ("false", "true")
    )
    assert offloaded.optimizer == 0 < resident.optimizer
    assert (offloaded.weights, offloaded.gradients) == (resident.weights, resident.gradients)


def test_gradient_checkpointing_reduces_activation_bytes():
    plain = load_config("imagenet256-bsq18")
    less = load_config("imagenet256-bsq18", ["model.gradient_checkpointing=true"])
    assert tokenizer_activation_bytes(less.model, half=True) < 0.25 * tokenizer_activation_bytes(plain.model, half=True)
