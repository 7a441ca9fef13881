"""Training stage of the tokenizer: terms of the loss, their weights, and the modules that get gradients."""

import pytest
import torch
import torch.nn.functional as F
from real_clips import street_clip

from bsq_ray import config
from bsq_ray.config import load_config
from bsq_ray.data.data_source import Batch
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.stream import evaluation_batches
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.losses.adversarial import discriminator_loss, generator_loss
from bsq_ray.models.frame_layout import frames_time_major
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.stages import build_stage
from bsq_ray.training.stages.tokenizer_stage import TokenizerStage

CPU = torch.device("cpu")
SMALL = [
    "model.image_size=32",
    "model.encoder.width=16",
    "model.encoder.layers=1",
    "model.encoder.heads=2",
    "model.decoder.width=16",
    "model.decoder.layers=1",
    "model.decoder.heads=2",
    "model.decoder.head_hidden_dim=32",
    "loss.perceptual_weight=0",
    "loss.adversarial.channel_base=256",
    "loss.adversarial.channel_max=8",
    "training.engine.kind=ddp",
]


@pytest.fixture(scope="module")
def batch(photo_shards):
    return next(evaluation_batches(ImageSource(read_manifest(photo_shards), config.DataConfig(), 32), 8))


def build(*overrides):
    run = load_config("imagenet128-bsq18", [*SMALL, *overrides])
    torch.manual_seed(0)
    stage = TokenizerStage(run, None, CPU)
    return stage, {
        name: build_engine(module, run.training, micro_batch=8, accumulation_steps=1, device=CPU)
        for name, module in stage.modules.items()
    }


def losses(batch, *overrides, step=0):
    """Return the stage, and by phase the loss and scalars of one step."""
    stage, engines = build(*overrides)
    return stage, run_phases(stage, engines, batch, step)


def run_phases(stage, engines, batch, step):
    context, results = None, {}
    for phase in stage.phases(step):
        for name, module in stage.modules.items():
            module.requires_grad_(name == phase)
        output = stage.loss(phase, batch, engines, context, step)
        context, results[phase] = output.context, (output.loss, output.scalars)
    return results


def test_generator_loss_is_weighted_sum_of_terms(batch):
    _, results = losses(batch, "loss.perceptual_weight=0.3", "loss.perceptual_network=alex")
    total, terms = results["generator"]
    # At step 0 the quantizer weight of 0.1 is multiplied by 3.
    expected = (
        terms["reconstruction"] + 0.3 * terms["perceptual"] + 0.1 * terms["loss/generator"] + 0.3 * terms["quantizer"]
    )
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_gram_weight_adds_texture_to_generator_loss(batch):
    overrides = ["loss.perceptual_weight=0.3", "loss.perceptual_network=alex", "loss.adversarial.weight=0"]
    without, with_gram = (losses(batch, *overrides, *more)[1]["generator"] for more in ([], ["loss.gram_weight=5"]))
    assert "gram" not in without[1]
    assert float(with_gram[1]["gram"]) > 0
    expected = without[0].detach() + 5 * with_gram[1]["gram"]
    assert float(with_gram[0].detach()) == pytest.approx(float(expected), rel=1e-6)


def test_gram_gradient_ratio_is_that_of_weighted_terms(batch):
    """Evaluations report how strongly the texture loss moves the pixels, relative to LPIPS."""
    overrides = ["loss.perceptual_weight=0.3", "loss.perceptual_network=alex", "loss.adversarial.weight=0"]
    (stage, engines), (double, double_engines) = (build(*overrides, f"loss.gram_weight={w}") for w in (5, 10))
    metrics, _ = stage.evaluate(batch, engines)
    real = to_float(batch.values_B)
    with torch.no_grad():
        images = stage.modules["generator"](real).images.clamp(-1, 1)
    images.requires_grad_()
    terms = stage.perceptual.with_texture(images, real)
    lpips, gram = (torch.autograd.grad(term.sum(), images, retain_graph=True)[0].norm() for term in terms)
    assert metrics["gram_gradient_ratio"] == pytest.approx(float(5 * gram / (0.3 * lpips)), rel=1e-4)
    doubled, _ = double.evaluate(batch, double_engines)
    assert doubled["gram_gradient_ratio"] == pytest.approx(2 * metrics["gram_gradient_ratio"], rel=1e-4)
    assert doubled["gram"] == pytest.approx(float(terms[1].mean().detach()), rel=1e-4)


@pytest.mark.parametrize(("kind", "loss"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_reconstruction_loss_follows_config(batch, kind, loss):
    stage, results = losses(batch, f"loss.reconstruction={kind}", "loss.reconstruction_weight=2")
    real = to_float(batch.values_B)
    with torch.no_grad():
        reconstructed = stage.modules["generator"](real).images
    total, terms = results["generator"]
    assert float(terms["reconstruction"]) == pytest.approx(float(loss(reconstructed, real)), rel=1e-6)
    rest = 0.1 * terms["loss/generator"] + 0.3 * terms["quantizer"]
    assert float(total.detach()) == pytest.approx(float(2 * terms["reconstruction"] + rest), rel=1e-6)


@pytest.mark.parametrize("discriminator", ["stylegan2", "patchgan", "features"])
@pytest.mark.parametrize("objective", ["non_saturating", "hinge"])
def test_phase_gradients_reach_only_own_module(batch, discriminator, objective):
    """Each phase produces gradients for its own module only."""
    stage, engines = build(f"loss.adversarial.discriminator={discriminator}", f"loss.adversarial.objective={objective}")
    context = None
    for phase in ("generator", "discriminator"):
        for name, module in stage.modules.items():
            module.requires_grad_(name == phase)
            module.zero_grad()
        output = stage.loss(phase, batch, engines, context, 0)
        output.loss.backward()
        context = output.context
        for name, module in stage.modules.items():
            has_grad = [parameter.grad is not None for parameter in module.parameters()]
            assert all(has_grad) if name == phase else not any(has_grad), (phase, name)


@pytest.mark.parametrize("discriminator", ["stylegan2", "features"])
def test_phase_gradients_equal_two_pass_version(batch, discriminator):
    """The surrogate term gives both modules the gradients of separate forward passes for each phase."""
    weights = ["loss.reconstruction_weight=0", "loss.quantizer_weight=0", "loss.adversarial.r1_gamma=0"]
    stage, engines = build(*weights, f"loss.adversarial.discriminator={discriminator}")
    generator, discriminator = stage.modules["generator"], stage.modules["discriminator"]
    run_weight = stage.loss_config.adversarial.weight
    outputs, context = {}, None
    for phase in ("generator", "discriminator"):
        for name, module in stage.modules.items():
            module.requires_grad_(name == phase)
        outputs[phase] = stage.loss(phase, batch, engines, context, 0)
        outputs[phase].loss.backward()
        context = outputs[phase].context
    one_pass = {name: [p.grad.clone() for p in module.parameters()] for name, module in stage.modules.items()}
    for module in stage.modules.values():
        module.zero_grad()
        module.requires_grad_(True)
    real = to_float(batch.values_B)
    fake = generator(real).images.clamp(-1, 1)
    generator_params = list(generator.parameters())
    plain = run_weight * generator_loss(discriminator(fake)[0], "non_saturating")
    expected = torch.autograd.grad(plain, generator_params)
    torch.testing.assert_close(one_pass["generator"], list(expected), rtol=1e-4, atol=1e-7)
    plain = discriminator_loss(discriminator(real)[0], discriminator(fake.detach())[0], "non_saturating")
    expected = torch.autograd.grad(plain, list(discriminator.parameters()))
    torch.testing.assert_close(one_pass["discriminator"], list(expected), rtol=1e-4, atol=1e-7)


def test_r1_penalty_applies_every_16_steps(batch):
    """The R1 penalty is added at every sixteenth step, multiplied by sixteen."""
    without = losses(batch, step=14)[1]["discriminator"]
    total, terms = losses(batch, step=15)[1]["discriminator"]
    assert "r1" not in without[1]
    assert float(total.detach()) == pytest.approx(
        float(terms["loss/discriminator"] + 10 / 2 * 16 * terms["r1"]), rel=1e-6
    )
    assert "r1" not in losses(batch, "loss.adversarial.r1_gamma=0", step=15)[1]["discriminator"][1]


def test_adversarial_loss_starts_at_start_step(batch):
    """The discriminator is trained from its configured start step on."""
    stage, results = losses(batch, "loss.adversarial.start_step=5", step=4)
    assert stage.phases(4) == ["generator"]
    assert stage.phases(5) == ["generator", "discriminator"]
    assert "loss/generator" not in results["generator"][1]


def test_zero_adversarial_weight_has_no_discriminator(batch):
    stage, results = losses(batch, "loss.adversarial.weight=0")
    assert list(stage.modules) == ["generator"]
    assert list(results) == ["generator"]


def test_adaptive_weight_balances_last_layer_gradients(batch):
    """The adaptive weight balances the gradients of both losses at the last layer."""
    stage, engines = build("loss.adversarial.adaptive_weight=true", "loss.quantizer_weight=0")
    stage.modules["discriminator"].requires_grad_(False)
    output = stage.loss("generator", batch, engines, None, 0)
    [total_grad] = torch.autograd.grad(output.loss, stage.modules["generator"].last_layer)
    stage, engines = build("loss.adversarial.weight=0", "loss.quantizer_weight=0")
    [pixel_grad] = torch.autograd.grad(
        stage.loss("generator", batch, engines, None, 0).loss, stage.modules["generator"].last_layer
    )
    # With weight 0.1, the adversarial gradient has a tenth of the reconstruction gradient's norm.
    assert float((total_grad - pixel_grad).norm() / pixel_grad.norm()) == pytest.approx(0.1, rel=0.02)
    assert float(output.scalars["adaptive_weight"]) > 0


def test_pop_metrics_resets_code_usage(batch):
    """Code usage covers the batches since the last call."""
    stage, _ = losses(batch)
    metrics = stage.pop_metrics()
    assert 0 < metrics["code_usage"] <= 1
    assert 0 < metrics["bit_entropy"] <= 1
    assert stage.pop_metrics() == {}


@pytest.mark.slow
def test_compiled_blocks_match_eager_loss(batch):
    eager = losses(batch)[1]["generator"][0]
    compiled = losses(batch, "training.engine.compile=true")[1]["generator"][0]
    assert float(compiled.detach()) == pytest.approx(float(eager.detach()), rel=1e-4)


# Clips


@pytest.fixture(scope="module")
def clips():
    """Eight clips of four frames."""
    values = torch.cat([street_clip(4, 32, start=start) for start in range(0, 32, 4)])
    return Batch(to_uint8(values), torch.zeros(8, dtype=torch.int64), [f"street@{n}" for n in range(8)])


@pytest.mark.parametrize("discriminator", ["stylegan2", "patchgan", "features", "stylegan2-3d"])
def test_clip_phase_gradients_reach_only_own_module(clips, discriminator):
    """Clips reach the discriminator as frames or clips, and each phase has gradients for its own module only."""
    stage, engines = build("model.frames=4", f"loss.adversarial.discriminator={discriminator}")
    context = None
    for phase in ("generator", "discriminator"):
        for name, module in stage.modules.items():
            module.requires_grad_(name == phase)
            module.zero_grad()
        output = stage.loss(phase, clips, engines, context, 15)
        output.loss.backward()
        context = output.context or context
        for name, module in stage.modules.items():
            has_grad = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters()]
            assert all(has_grad) if name == phase else not any(has_grad), (phase, name)
    assert "r1" in output.scalars
    assert context.real_images.ndim == (5 if discriminator == "stylegan2-3d" else 4)


def test_clip_loss_terms_are_frame_means(clips):
    """The loss terms of clips are means over their frames."""
    overrides = ["model.frames=4", "loss.perceptual_weight=0.3", "loss.perceptual_network=alex"]
    stage, results = losses(clips, *overrides)
    real = to_float(clips.values_B)
    with torch.no_grad():
        reconstructed = stage.modules["generator"](real).images
        by_frame = [stage.perceptual(reconstructed[:, :, t].clamp(-1, 1), real[:, :, t]).mean() for t in range(4)]
    terms = results["generator"][1]
    assert float(terms["perceptual"]) == pytest.approx(float(torch.stack(by_frame).mean()), rel=1e-4)
    assert float(terms["reconstruction"]) == pytest.approx(float((reconstructed - real).abs().mean()), rel=1e-5)


def test_clip_r1_penalty_matches_frames_as_images(clips):
    """PatchGAN, which has no batch statistics, gives clips the penalty of their frames as images."""
    overrides = ["model.frames=4", "loss.adversarial.discriminator=patchgan"]
    stage, engines = build(*overrides)
    clip_scalars = run_phases(stage, engines, clips, 15)["discriminator"][1]
    values = frames_time_major(clips.values_B)
    frames = Batch(values, torch.zeros(len(values), dtype=torch.int64), ["x"] * len(values))
    frame_scalars = run_phases(stage, engines, frames, 15)["discriminator"][1]
    assert float(clip_scalars["r1"]) == pytest.approx(float(frame_scalars["r1"]), rel=1e-4)
    assert float(clip_scalars["logits_real"]) == pytest.approx(float(frame_scalars["logits_real"]), rel=1e-4)


@pytest.mark.parametrize("discriminator", ["stylegan2", "features"])
@pytest.mark.parametrize("share", [slice(0, None, 2), slice(1, None, 2), slice(3, 4)])
def test_clip_logits_do_not_depend_on_batch_split(clips, share, discriminator):
    """Every second clip, or one clip alone, has the logits that it has in the full batch."""
    stage, _ = build("model.frames=4", f"loss.adversarial.discriminator={discriminator}")
    discriminator = stage.modules["discriminator"]
    values = to_float(clips.values_B)
    full_logits, part_logits = (
        torch.cat([head.flatten(1) for head in heads], 1) if isinstance(heads, tuple) else heads
        for heads in (discriminator(frames_time_major(batch))[0] for batch in (values, values[share]))
    )
    by_frame = full_logits.view(4, 8, -1)
    torch.testing.assert_close(part_logits.view_as(by_frame[:, share]), by_frame[:, share], rtol=1e-4, atol=1e-5)


def test_clip_evaluate_shows_first_clip_per_frame_psnr(clips):
    """The sample image shows frames of the first clip, and the metrics are means over frames."""
    stage, engines = build("model.frames=4")
    metrics, image = stage.evaluate(clips, engines)
    assert image.shape == (3, 64, 4 * 32)
    assert torch.equal(image[:, :32], torch.cat(list(clips.values_B[0].transpose(0, 1)), 2))
    reconstructed = to_uint8(stage.modules["generator"](to_float(clips.values_B)).images.clamp(-1, 1))
    error_BT = (reconstructed.float() - clips.values_B.float()).square().mean((1, 3, 4))
    assert metrics["psnr"] == pytest.approx(float((10 * torch.log10(255**2 / error_BT)).mean()), abs=1e-3)


def test_stage_initializes_from_image_model(clips, tmp_path):
    """A video stage can start from the weights of an image model."""
    image, _ = build()
    image.modules["generator"].save_pretrained(str(tmp_path))
    run = load_config("imagenet128-bsq18", [*SMALL, "model.frames=4"])
    video = build_stage(run, None, CPU, str(tmp_path)).modules["generator"]
    frame = to_float(clips.values_B[:, :, 0])
    assert torch.equal(video(frame).images, image.modules["generator"](frame).images)


def test_compile_unsupported_width_raises():
    """Widths that compiled kernels cannot handle are rejected."""
    narrow = ["model.encoder.width=18", "model.encoder.heads=3", "training.engine.compile=true"]
    with pytest.raises(ValueError, match="widths that are multiples of 4"):
        build(*narrow)
