"""Saved activations by formula against the bytes that PyTorch saves for the backward pass."""

import pytest
import torch
from reference_dino import random_dino_weights

from bsq_ray.config import load_config
from bsq_ray.losses.perceptual import PerceptualLoss
from bsq_ray.models.discriminators import build_discriminator
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.prior import Prior
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.planning.activations import (
    attention_mask_bytes,
    decoder_activation_bytes,
    discriminator_activation_bytes,
    discriminator_phase_bytes,
    perceptual_activation_bytes,
    tokenizer_activation_bytes,
)
from bsq_ray.planning.layer_costs import num_tokenizer_parameters
from bsq_ray.planning.memory import training_memory
from bsq_ray.training.engines.backward_buckets import BUCKET_ELEMENTS
from bsq_ray.training.optimizers.build import build_optimizers

IMAGES = 4


def saved_tensor_bytes(forward, module, copies):
    """Return the bytes of distinct storages saved by `forward`, minus the module's weights and `copies` bytes."""
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


def tokenizer_saved_bytes(model, half):
    """Return the bytes that PyTorch saves for the backward pass of a tokenizer on a batch."""
    tokenizer, images_BCHW = Tokenizer(model), random_images(model.image_size, model.frames)

    def forward():
        with autocast(half):
            output = tokenizer(images_BCHW)
            return (output.images - images_BCHW).abs().mean() + output.quantized.loss, output.images.clamp(-1, 1)

    copies = 2 * sum(value.numel() for value in tokenizer.parameters()) if half else 0
    return saved_tensor_bytes(forward, tokenizer, copies)


@pytest.mark.parametrize("half", [True, False])
@cases(
    ["model.quantizer.bits=36", "model.encoder.mlp_ratio=2"],
    ["model.image_size=128"],
    ["model.frames=4"],
    ["model.frames=4", "model.causal=false"],
)
def test_tokenizer_activation_bytes_within_five_percent(overrides, half, fused_attention):
    """The formula is within five percent of the bytes that PyTorch saves for the tokenizer's backward pass."""
    model = load_config("demo-gan", overrides).model
    saved_bytes = tokenizer_saved_bytes(model, half)
    assert tokenizer_activation_bytes(model, half) == pytest.approx(saved_bytes / IMAGES, rel=0.05)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.frames=3"],
        ["model.frames=3", "model.causal=false"],
        ["model.image_size=160"],
        ["model.image_size=160", "model.frames=3"],
        ["model.image_size=192", "model.frames=3", "model.causal=false", "model.attention_radius=2"],
    ],
)
def test_local_attention_bytes_within_six_percent(overrides, half, fused_attention):
    """Blocks of large frames save copies of keys and values; masks are saved once for all samples."""
    sizes = "{width: 128, layers: 2, heads: 4}"
    small = [f"model.encoder={sizes}", f"model.decoder={sizes}"]
    model = load_config("demo-any-size", [*small, *overrides]).model
    saved_bytes = tokenizer_saved_bytes(model, half)
    planned_bytes = IMAGES * tokenizer_activation_bytes(model, half) + attention_mask_bytes(model, False, half)
    assert planned_bytes == pytest.approx(saved_bytes, rel=0.06)


@pytest.mark.parametrize("half", [True, False])
@cases(["model.quantizer.bits=36", "model.decoder.mlp_ratio=2"])
def test_decoder_activation_bytes_within_five_percent(overrides, half, fused_attention):
    """With frozen tokens the encoder saves nothing."""
    model = load_config("demo-gan", overrides).model
    tokenizer, images_BCHW = Tokenizer(model), random_images(model.image_size, model.frames)
    for part in (tokenizer.encoder, tokenizer.to_code, tokenizer.quantizer):
        part.requires_grad_(False)

    def forward():
        with autocast(half):
            output = tokenizer(images_BCHW)
            return (output.images - images_BCHW).abs().mean(), output.images.clamp(-1, 1)

    trained = [value for value in tokenizer.parameters() if value.requires_grad]
    copies = 2 * sum(value.numel() for value in trained) if half else 0
    saved_bytes = saved_tensor_bytes(forward, tokenizer, copies)
    assert decoder_activation_bytes(model, half) == pytest.approx(saved_bytes / IMAGES, rel=0.05)


def test_training_of_decoder_alone_needs_less_memory():
    """Gradients, moments and average are those of the decoder; weights are those of the whole model."""
    run, full = load_config("demo-gan", ["training.only=decoder"]), load_config("demo-gan")
    planned, planned_full = training_memory(run, 1, 4), training_memory(full, 1, 4)
    tokenizer = Tokenizer(run.model)
    frozen = [*tokenizer.encoder.parameters(), *tokenizer.to_code.parameters(), *tokenizer.quantizer.parameters()]
    num_frozen = sum(value.numel() for value in frozen)
    assert planned_full.gradients - planned.gradients == 4 * num_frozen
    assert planned_full.optimizer - planned.optimizer == 12 * num_frozen
    assert planned_full.ema - planned.ema == 4 * num_frozen
    assert planned_full.weights == planned.weights
    assert planned.activations < planned_full.activations


@pytest.mark.parametrize("half", [True, False])
@cases(["model.image_size=128", "loss.adversarial.channel_base=8192"], ["loss.adversarial.discriminator=patchgan"])
def test_discriminator_activation_bytes_within_ten_percent(overrides, half):
    """The formula is within ten percent of the bytes that PyTorch saves for the discriminator's backward pass."""
    run = load_config("demo-gan", overrides)
    adversarial, size = run.loss.adversarial, run.model.image_size
    discriminator, images_BCHW = build_discriminator(adversarial, size), random_images(size).requires_grad_()

    def forward():
        with autocast(half):
            return discriminator(images_BCHW)

    weights = sum(value.numel() for value in discriminator.parameters())
    # Weights with equalized learning rate are computed, so fp32 saves a copy of them, too.
    copies = 2 * weights if half else 4 * weights * (adversarial.discriminator == "stylegan2")
    saved_bytes = saved_tensor_bytes(forward, discriminator, copies)
    assert discriminator_activation_bytes(adversarial, size, half) == pytest.approx(saved_bytes / IMAGES, rel=0.1)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("features", ["alex", "vgg", "dino"])
def test_feature_discriminator_bytes_within_ten_percent(features, half, tmp_path):
    """The formulas are within ten percent of what is saved for a reconstruction, and for an original without R1."""
    torch.save(random_dino_weights(), tmp_path / "dino.pth")
    settings = {"discriminator": "features", "features": features, "features_weights": tmp_path / "dino.pth"}
    overrides = [f"loss.adversarial.{key}={value}" for key, value in (settings | {"r1_gamma": 0}).items()]
    run = load_config("demo-gan", [*overrides, f"training.engine.precision={'bf16' if half else 'fp32'}"])
    discriminator = build_discriminator(run.loss.adversarial, 64)
    frozen = sum(value.numel() for value in discriminator.frozen_network.parameters())
    heads = sum(value.numel() for value in discriminator.parameters())
    networks = torch.nn.ModuleList([discriminator, discriminator.frozen_network])
    original, reconstruction = random_images(64), random_images(64).requires_grad_()

    def forward(images_BCHW):
        with autocast(half):
            return discriminator(images_BCHW)

    # Weights divided by their spectral norms, and copies of all weights in half precision.
    copies = 2 * heads if half else 4 * heads
    of_original = saved_tensor_bytes(lambda: forward(original), networks, copies)
    copies += 2 * frozen if half else 0
    of_reconstruction = saved_tensor_bytes(lambda: forward(reconstruction), networks, copies)
    assert discriminator_activation_bytes(run.loss.adversarial, 64, half) == pytest.approx(
        of_reconstruction / IMAGES, rel=0.1
    )
    assert discriminator_phase_bytes(run) == pytest.approx((of_original + of_reconstruction) / IMAGES, rel=0.1)


@pytest.mark.parametrize("frames", [4, 5])
def test_clip_discriminator_bytes_within_ten_percent(frames):
    """The formula is within ten percent of the bytes that PyTorch saves for the clip discriminator's backward
    pass.
    """
    overrides = [f"model.frames={frames}", "loss.adversarial.discriminator=stylegan2-3d"]
    adversarial = load_config("demo-gan", overrides).loss.adversarial
    discriminator, clips = build_discriminator(adversarial, 64, frames), random_images(64, frames).requires_grad_()
    weights = sum(value.numel() for value in discriminator.parameters())
    # Only in fp32: in half precision a CPU averages in fp32 and a GPU does not.
    saved_bytes = saved_tensor_bytes(lambda: discriminator(clips), discriminator, 4 * weights)
    assert discriminator_activation_bytes(adversarial, 64, False, frames) == pytest.approx(
        saved_bytes / IMAGES, rel=0.1
    )


@pytest.mark.parametrize("half", [True, False])
@cases(
    ["loss.perceptual_network=vgg"],
    ["loss.perceptual_network=vgg", "loss.gram_weight=1"],
    ["loss.perceptual_network=alex+vgg"],
)
def test_lpips_activation_bytes_within_five_percent(overrides, half):
    loss = load_config("demo-gan", overrides).loss
    network, original = PerceptualLoss(*loss.perceptual_networks), random_images(64)
    reconstruction = random_images(64).requires_grad_()

    def forward():
        with autocast(half):
            return (network.with_texture if loss.gram_weight else network)(reconstruction, original)

    trunks = [lpips.trunk for lpips in network.networks]
    copies = 2 * sum(value.numel() for trunk in trunks for value in trunk.parameters()) if half else 0
    saved_bytes = saved_tensor_bytes(forward, network, copies)
    assert perceptual_activation_bytes(loss, 64, half) == pytest.approx(saved_bytes / IMAGES, rel=0.05)


def test_zero_partitions_more_state_at_each_stage():
    stages = [training_memory(load_config("demo-gan", [f"training.engine.zero_stage={s}"]), 4, 4) for s in range(4)]
    none, optimizer, gradients, weights = stages
    # Two moments on every worker, compared with two moments and ZeRO's weights divided by four.
    assert optimizer.optimizer == none.optimizer * 3 / 8
    assert gradients.gradients == none.gradients / 4
    assert weights.weights < gradients.weights == none.weights


def test_zero_2_keeps_all_gradients_while_accumulating():
    run = load_config("demo-gan", ["training.engine.zero_stage=2", "training.batch_size=64"])
    whole, parts = training_memory(run, 4, 16), training_memory(run, 4, 8)
    assert parts.gradients == 4 * whole.gradients


@pytest.mark.parametrize(("workers", "num_elements"), [(1, 0), (2, 25_000_000)])
def test_ddp_copies_one_bucket_of_gradients(workers, num_elements):
    """Data parallelism has its gradients and the copy of one bucket, not of all of them."""
    run = load_config("imagenet256-bsq18", ["training.engine.kind=ddp"])
    assert BUCKET_ELEMENTS == 25_000_000
    assert training_memory(run, workers, 4).buckets == 4 * num_elements


def test_zero_bucket_has_the_size_of_the_larger_engine():
    """ZeRO-1 has the gradients of one engine in the buckets that it sends, and in DeepSpeed's buffer."""
    runs = [
        load_config("imagenet256-bsq18", [f"training.engine.communication_data_type={name}"])
        for name in ("fp32", "bf16")
    ]
    num_parameters = num_tokenizer_parameters(runs[0].model)
    assert training_memory(runs[0], 1, 4).buckets == 4 * num_parameters
    assert training_memory(runs[0], 4, 4).buckets == (4 + 4) * num_parameters
    assert training_memory(runs[1], 4, 4).buckets == (4 + 2) * num_parameters


@pytest.mark.parametrize("preset", ["demo-gan", "masked-lm-demo", "prior-demo"])
def test_muon_needs_one_moment_per_matrix_element(preset):
    """The planned optimizer state of Muon is what its optimizers hold after a step."""
    run = load_config(preset, ["training.engine.kind=ddp", "training.optimizer.kind=muon"])
    adamw = load_config(preset, ["training.engine.kind=ddp", "training.optimizer.kind=adamw"])
    model = {"demo-gan": Tokenizer, "masked-lm-demo": MaskedLM, "prior-demo": Prior}[preset](run.model)
    optimizers = build_optimizers(model, run.training.optimizer, use_bf16=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers.values():
        optimizer.step()
    states = [state for optimizer in optimizers.values() for state in optimizer.state.values()]
    measured = sum(value.numel() * 4 for state in states for value in state.values() if value.ndim)
    planned, planned_adamw = (training_memory(config, 4, 4).optimizer for config in (run, adamw))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert planned_adamw - planned == 8 * num_parameters - measured


@pytest.mark.parametrize(
    ("preset", "kind"),
    [("demo-gan", "stylegan2"), ("demo-gan", "patchgan"), ("demo-gan", "features"), ("demo-video", "stylegan2-3d")],
)
def test_muon_on_convolutions_needs_one_moment_per_kernel_element(preset, kind):
    """Kernels of the discriminator have one moment instead of two; its linear layers keep both."""
    muon = ["training.engine.kind=ddp", "training.optimizer.kind=muon", f"loss.adversarial.discriminator={kind}"]
    without = load_config(preset, muon)
    run = load_config(preset, [*muon, "training.optimizer.muon.convolutions=true"])
    discriminator = build_discriminator(run.loss.adversarial, run.model.image_size, run.model.frames)
    num_elements = sum(value.numel() for value in discriminator.parameters() if value.ndim >= 4)
    planned, planned_without = (training_memory(config, 4, 4).optimizer for config in (run, without))
    assert planned_without - planned == 4 * num_elements


def test_offloaded_optimizer_uses_no_gpu_memory():
    resident, offloaded = (
        training_memory(load_config("demo-gan", [f"training.engine.offload_optimizer={value}"]), 4, 4)
        for value in ("false", "true")
    )
    assert offloaded.optimizer == 0 < resident.optimizer
    assert (offloaded.weights, offloaded.gradients) == (resident.weights, resident.gradients)


def test_gradient_checkpointing_reduces_activation_bytes():
    plain = load_config("imagenet256-bsq18")
    less = load_config("imagenet256-bsq18", ["model.gradient_checkpointing=true"])
    assert tokenizer_activation_bytes(less.model, half=True) < 0.25 * tokenizer_activation_bytes(plain.model, half=True)
