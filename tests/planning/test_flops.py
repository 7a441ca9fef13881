"""Parameters and operations by formula equal those of the built modules."""

import pytest
import torch
from reference_dino import random_dino_weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bsq_ray.config import load_config, preset_names
from bsq_ray.data.data_source import Batch
from bsq_ray.losses.perceptual import PerceptualLoss
from bsq_ray.models.discriminators import build_discriminator
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.planning.feature_costs import num_frozen_parameters
from bsq_ray.planning.flops import tokenizer_forward_flops, tokenizer_step_flops
from bsq_ray.planning.layer_costs import num_discriminator_parameters, num_tokenizer_parameters, perceptual_layers
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.stages.tokenizer_stage import TokenizerStage

TOKENIZERS = [name for name in preset_names() if load_config(name).stage == "tokenizer"]

CPU = torch.device("cpu")


class FlopCounter(TorchDispatchMode):
    """Count as `FlopCounterMode`, which does not support gradients of gradients."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def count_parameters(module):
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parameter_counts_of_presets_are_exact(name):
    run = load_config(name)
    with torch.device("meta"):
        assert num_tokenizer_parameters(run.model) == count_parameters(Tokenizer(run.model))
        if run.loss.adversarial.weight:
            discriminator = build_discriminator(run.loss.adversarial, run.model.image_size)
            assert num_discriminator_parameters(run.loss.adversarial, run.model.image_size) == count_parameters(
                discriminator
            )
        else:
            assert num_discriminator_parameters(run.loss.adversarial, run.model.image_size) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.frames=16"],
        ["model.quantizer.kind=fsq"],
        ["loss.adversarial.discriminator=patchgan"],
        ["loss.adversarial.discriminator=features"],
        [
            "loss.adversarial.discriminator=features",
            "loss.adversarial.features=alex",
            "loss.adversarial.channel_max=96",
        ],
        ["model.encoder.width=384", "model.encoder.mlp_ratio=2.5", "model.decoder.layers=3"],
    ],
)
def test_parameter_counts_follow_the_configuration(overrides):
    run = load_config("imagenet128-bsq18", overrides)
    with torch.device("meta"):
        assert num_tokenizer_parameters(run.model) == count_parameters(Tokenizer(run.model))
        discriminator = build_discriminator(run.loss.adversarial, 128)
        assert num_discriminator_parameters(run.loss.adversarial, 128) == count_parameters(discriminator)


@pytest.mark.parametrize(
    ("name", "generator", "discriminator"),
    [
        ("imagenet128-bsq18", 173_636_562, 28_389_121),
        ("imagenet256-bsq18", 174_816_210, 28_864_129),
        ("imagenet256-bsq36", 174_843_876, 28_864_129),
    ],
)
def test_parameter_counts_match_released_code(name, generator, discriminator):
    run = load_config(name)
    assert num_tokenizer_parameters(run.model) == generator
    assert num_discriminator_parameters(run.loss.adversarial, run.model.image_size) == discriminator


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_perceptual_network_parameter_count_is_exact(network):
    num_planned = sum(layer.num_parameters for layers in perceptual_layers(network, 64) for layer in layers)
    assert num_planned == count_parameters(PerceptualLoss(network).networks[0].trunk)


@pytest.mark.parametrize("features", ["alex", "vgg", "dino"])
def test_frozen_parameter_count_is_exact(features, tmp_path):
    torch.save(random_dino_weights(), tmp_path / "dino.pth")
    settings = {"discriminator": "features", "features": features, "features_weights": tmp_path / "dino.pth"}
    overrides = [f"loss.adversarial.{key}={value}" for key, value in (settings | {"r1_gamma": 0}).items()]
    adversarial = load_config("demo-gan", overrides).loss.adversarial
    discriminator = build_discriminator(adversarial, 64)
    network = discriminator.frozen_network
    buffers = [network.cls_token, network.pos_embed] if features == "dino" else []
    num_frozen = count_parameters(network) + sum(value.numel() for value in buffers)
    assert num_frozen_parameters(adversarial, 64) == num_frozen
    assert num_discriminator_parameters(adversarial, 64) == count_parameters(discriminator)


@pytest.mark.parametrize("frames", [16, 6, 5])
def test_clip_discriminator_parameter_count_is_exact(frames):
    overrides = [f"model.frames={frames}", "loss.adversarial.discriminator=stylegan2-3d"]
    run = load_config("ucf101-bsq18", overrides)
    with torch.device("meta"):
        discriminator = build_discriminator(run.loss.adversarial, 128, frames)
    assert num_discriminator_parameters(run.loss.adversarial, 128, frames) == count_parameters(discriminator)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("demo-gan", []),
        ("imagenet256-bsq36", []),
        ("ucf101-bsq18", ["model.gradient_checkpointing=false"]),
        ("ucf101-bsq18-noncausal", ["model.gradient_checkpointing=false"]),
        ("photo", []),
        ("photo", ["model.image_size=160"]),
        ("photo", ["model.image_size=160", "model.attention_radius=30"]),
    ],
)
def test_tokenizer_forward_flops_are_exact(name, overrides):
    model = load_config(name, overrides).model
    patches = 3 * model.patch_size**2
    with torch.device("meta"):
        tokenizer = Tokenizer(model)
        patches_BNP = torch.zeros(2, model.frames * (model.image_size // model.patch_size) ** 2, patches)
        with FlopCounter() as counter:
            grid = model.grid_size, model.grid_size
            codes_BNC = tokenizer.to_code(tokenizer.encoder(patches_BNP, grid))
            tokenizer.decoder(tokenizer.from_code(codes_BNC), grid)
    assert counter.total == 2 * tokenizer_forward_flops(model)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["loss.perceptual_network=vgg", "model.gradient_checkpointing=true"],
        ["loss.perceptual_network=vgg", "loss.gram_weight=1", "loss.adversarial.weight=0"],
        ["loss.perceptual_network=alex+vgg", "loss.gram_weight=1"],
        ["loss.adversarial.discriminator=patchgan", "loss.perceptual_weight=0"],
        ["training.only=decoder", "loss.perceptual_weight=0", "loss.adversarial.weight=0"],
        ["training.only=decoder", "model.gradient_checkpointing=true", "loss.adversarial.channel_base=512"],
        ["loss.adversarial.r1_gamma=0", "loss.adversarial.channel_base=4096"],
        ["model.frames=4"],
        ["model.frames=4", "loss.adversarial.discriminator=stylegan2-3d", "loss.adversarial.channel_base=512"],
        ["loss.adversarial.discriminator=features", "loss.adversarial.features=alex", "loss.perceptual_weight=0"],
        [
            "loss.adversarial.discriminator=features",
            "loss.adversarial.features=vgg",
            "loss.adversarial.r1_gamma=0",
            "loss.adversarial.channel_max=512",
        ],
    ],
)
def test_training_step_flops_are_within_two_percent(overrides):
    assert_step_flops_within_two_percent(overrides)


def test_training_step_flops_with_dino_are_within_two_percent(tmp_path):
    torch.save(random_dino_weights(), tmp_path / "dino.pth")
    settings = {
        "discriminator": "features",
        "features": "dino",
        "features_weights": tmp_path / "dino.pth",
        "r1_gamma": 0,
    }
    assert_step_flops_within_two_percent([f"loss.adversarial.{key}={value}" for key, value in settings.items()])


def assert_step_flops_within_two_percent(overrides):
    run = load_config(
        "demo-gan",
        ["loss.adversarial.start_step=0", "loss.adversarial.r1_every=2", "training.engine.kind=ddp", *overrides],
    )
    stage = TokenizerStage(run, None, CPU)
    engines = {
        name: build_engine(module, run.training, micro_batch=4, accumulation_steps=1, device=CPU)
        for name, module in stage.modules.items()
    }
    shape = (4, 3, 64, 64) if run.model.frames == 1 else (4, 3, run.model.frames, 64, 64)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(4, dtype=torch.long), list("abcd"))
    # On CPUs the operations of fused attention are not registered.
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        for step in (0, 1):
            context = None
            for phase in stage.phases(step):
                stage.select_phase(phase)
                output = stage.loss(phase, batch, engines, context, step)
                engines[phase].backward(output.loss)
                context = output.context
    assert sum(tokenizer_step_flops(run).values()) * 8 == pytest.approx(counter.total, rel=0.02)
