"""What the formulas say is kept for the backward pass, against what PyTorch really keeps."""

import pytest
import torch

from bsq_ray.config import load_config
from bsq_ray.losses.perceptual import PerceptualLoss
from bsq_ray.models.discriminators.stylegan2 import build_discriminator
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.planning.activations import discriminator_bytes, perceptual_bytes, tokenizer_bytes
from bsq_ray.planning.memory import training_memory

IMAGES = 4


def kept_bytes(forward, module, copies):
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
    kept = sum(storage.nbytes() for storage in storages.values()) - copies
    assert result is not None
    return kept


def cases(*more):
    return pytest.mark.parametrize("overrides", [[], *more])


def images(size, frames=1):
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
def test_the_tokenizer_keeps_what_the_formula_says_within_five_percent(overrides, half, fused_attention):
    model = load_config("demo", overrides).model
    tokenizer, images_BCHW = Tokenizer(model), images(model.image_size, model.frames)

    def forward():
        with autocast(half):
            output = tokenizer(images_BCHW)
            return (output.images - images_BCHW).abs().mean() + output.quantized.loss, output.images.clamp(-1, 1)

    copies = 2 * sum(value.numel() for value in tokenizer.parameters()) if half else 0
    kept = kept_bytes(forward, tokenizer, copies)
    assert tokenizer_bytes(model, half) == pytest.approx(kept / IMAGES, rel=0.05)


@pytest.mark.parametrize("half", [True, False])
@cases(["model.image_size=128", "loss.adversarial.channel_base=8192"], ["loss.adversarial.discriminator=patchgan"])
def test_the_discriminator_keeps_what_the_formula_says_within_ten_percent(overrides, half):
    run = load_config("demo", overrides)
    adversarial, size = run.loss.adversarial, run.model.image_size
    discriminator, images_BCHW = build_discriminator(adversarial, size), images(size).requires_grad_()

    def forward():
        with autocast(half):
            return discriminator(images_BCHW)

    weights = sum(value.numel() for value in discriminator.parameters())
    # Equalised weights are computed, so fp32 keeps a copy of them as well.
    copies = 2 * weights if half else 4 * weights * (adversarial.discriminator == "stylegan2")
    kept = kept_bytes(forward, discriminator, copies)
    assert discriminator_bytes(adversarial, size, half) == pytest.approx(kept / IMAGES, rel=0.1)


@pytest.mark.parametrize("frames", [4, 5])
def test_the_discriminator_of_clips_keeps_what_the_formula_says_within_ten_percent(frames):
    overrides = [f"model.frames={frames}", "loss.adversarial.discriminator=stylegan2-3d"]
    adversarial = load_config("demo", overrides).loss.adversarial
    discriminator, clips = build_discriminator(adversarial, 64, frames), images(64, frames).requires_grad_()
    weights = sum(value.numel() for value in discriminator.parameters())
    # In fp32 alone: half precision on a CPU averages in fp32, on a GPU it does not.
    kept = kept_bytes(lambda: discriminator(clips), discriminator, 4 * weights)
    assert discriminator_bytes(adversarial, 64, False, frames) == pytest.approx(kept / IMAGES, rel=0.1)


@pytest.mark.parametrize("half", [True, False])
@cases(["loss.perceptual_network=vgg"])
def test_lpips_keeps_what_the_formula_says_within_five_percent(overrides, half):
    loss = load_config("demo", overrides).loss
    network, original = PerceptualLoss(loss.perceptual_network), images(64)
    reconstruction = images(64).requires_grad_()

    def forward():
        with autocast(half):
            return network(reconstruction, original)

    copies = 2 * sum(value.numel() for value in network.lpips.net.parameters()) if half else 0
    kept = kept_bytes(forward, network, copies)
    assert perceptual_bytes(loss, 64, half) == pytest.approx(kept / IMAGES, rel=0.05)


def test_zero_partitions_one_thing_more_at_each_stage():
    stages = [training_memory(load_config("demo", [f"training.engine.zero_stage={s}"]), 4, 4) for s in range(4)]
    none, optimizer, gradients, weights = stages
    # Two moments on every worker, against two moments and ZeRO's own weights on four.
    assert optimizer.optimizer == none.optimizer * 3 / 8
    assert gradients.gradients == none.gradients / 4
    assert weights.weights < gradients.weights == none.weights


def test_an_offloaded_optimizer_takes_nothing_of_the_card():
    kept, offloaded = (
        training_memory(load_config("demo", [f"training.engine.offload_optimizer={value}"]), 4, 4)
        for value in ("false", "true")
    )
    assert offloaded.optimizer == 0 < kept.optimizer
    assert (offloaded.weights, offloaded.gradients) == (kept.weights, kept.gradients)


def test_gradient_checkpointing_keeps_a_fraction():
    plain = load_config("imagenet256-bsq18")
    less = load_config("imagenet256-bsq18", ["model.gradient_checkpointing=true"])
    assert tokenizer_bytes(less.model, half=True) < 0.25 * tokenizer_bytes(plain.model, half=True)
