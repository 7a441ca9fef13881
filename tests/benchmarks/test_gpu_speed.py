"""Speed and memory of the presets on one GPU: steps, reconstruction, quantizers, sampling, decoding; with predictions.

fp32 is strict fp32 (no TF32), also in the baselines. Weights are random and images are noise; neither changes the time.
Times are medians. R1 runs in every sixteenth step and is averaged. Memory is the peak of PyTorch's allocator.
"""

import pytest
import torch
import torch.nn.functional as F
from gpu_timing import (
    BATCH,
    DEVICE,
    DRY_RUN,
    PLANNED_GPU,
    autocast,
    busy_milliseconds,
    load_gpu_preset,
    milliseconds,
    profile_step,
    with_peak_memory,
)
from quantizer_steps import quantizer_steps
from training_steps import NaiveTrainingSteps, TrainingSteps

from bsq_ray import Generator, Prior, Tokenizer
from bsq_ray.data.transforms import to_float
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.ops.blur import blur
from bsq_ray.models.pretrained_weights import resolve_once
from bsq_ray.planning.gpus import find_gpu
from bsq_ray.planning.planner import make_plan
from bsq_ray.runtime.precision import enable_strict_fp32
from bsq_ray.training.stages.tokenizer_stage import DiscriminatorContext

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark]
# Rows of quantizer-h100.json.
QUANTIZERS = ("bsq-18", "bsq-36", "bsq-128", "lfq", "fsq")
TOKENIZERS = ("imagenet128-bsq18", "imagenet256-bsq18")
# Images per second on an A5000 published in the paper, by preset.
PUBLISHED = {"imagenet256-bsq18": 45.1}


@pytest.fixture(autouse=True)
def reset_gpu_state():
    if not DRY_RUN:
        torch.cuda.init()
    enable_strict_fp32()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def step_seconds(kind, run):
    """Return the seconds of an average step after warm-up; every sixteenth step has the R1 penalty."""
    training = kind(run, DEVICE)
    for number in (0, 15, 1):
        training.step(number)
    without_r1 = milliseconds(lambda: training.step(2), 5, warm=0)
    with_r1 = milliseconds(lambda: training.step(15), 3, warm=0)
    return (without_r1 * 15 + with_r1) / 16 / 1000


def load_preset(name, precision="bf16", *more, batch=BATCH):
    return load_gpu_preset(name, f"training.batch_size={batch}", f"training.engine.precision={precision}", *more)


# Baselines measured earlier in the run, by preset and precision.
NAIVE_SECONDS = {}


@pytest.mark.parametrize("mode", ["naive", "eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_full_training_step_speed(name, precision, mode, record):
    """Generator, LPIPS (VGG), discriminator, R1, both optimizers, moving average; without loading data."""
    if (mode, precision) == ("compiled", "fp32"):
        pytest.skip("compilation does not change fp32 steps, which are bound by matrix products")
    resolve_once("lpips-vgg")
    run = load_preset(name, precision, f"training.engine.compile={'true' if mode == 'compiled' else 'false'}")
    kind = NaiveTrainingSteps if mode == "naive" else TrainingSteps
    seconds, peak = with_peak_memory(lambda: step_seconds(kind, run))
    if seconds is None:
        pytest.skip("the GPU's memory is insufficient")
    if mode == "naive":
        NAIVE_SECONDS[name, precision] = seconds
        return
    plan = make_plan(run, PLANNED_GPU, 1)
    naive_seconds = NAIVE_SECONDS.get((name, precision))
    record(
        "training-step-h100",
        f"{run.model.image_size}-{precision}-{mode}",
        step_s=seconds,
        images_per_s=BATCH / seconds,
        memory_gb=peak,
        naive_s=naive_seconds,
        speedup=naive_seconds and naive_seconds / seconds,
        predicted_s=plan.step_s,
        time_ratio=plan.step_s / seconds,
        predicted_gb=plan.memory.total / 1e9,
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("batch", [32, 64])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_training_step_utilization(name, batch, compiled, record):
    """Step time and the GPU's busy time in it, fraction of the peak, and memory next to the planned."""
    resolve_once("lpips-vgg")
    overrides = ["training.engine.kind=ddp", f"training.engine.compile={'true' if compiled else 'false'}"]
    run = load_preset(name, "bf16", *overrides, batch=batch)
    busy_ms = 0.0

    def work():
        nonlocal busy_ms
        seconds = step_seconds(TrainingSteps, run)
        training = TrainingSteps(run, DEVICE)
        training.step(1)
        busy_ms = busy_milliseconds(lambda: training.step(2))
        return seconds

    seconds, peak = with_peak_memory(work)
    if seconds is None:
        pytest.skip("the GPU's memory is insufficient")
    plan = make_plan(run, PLANNED_GPU, 1)
    utilization = plan.step_flops / seconds / (find_gpu(PLANNED_GPU).bf16_tflops * 1e12)
    record(
        "step-utilization-h200",
        f"{run.model.image_size}-{batch}-{'compiled' if compiled else 'eager'}",
        step_ms=1000 * seconds,
        busy_ms=busy_ms,
        utilization=utilization,
        memory_gb=peak,
        planned_gb=plan.memory.total / 1e9,
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_training_step_profile(name, record_measurement):
    """GPU time of a step by group of kernels, and the host's time."""
    resolve_once("lpips-vgg")
    training = TrainingSteps(load_preset(name, "bf16", "training.engine.kind=ddp"), DEVICE)
    for number in range(3):
        training.step(number)
    groups, host_ms = profile_step(lambda: training.step(2))
    total = sum(groups.values())
    for group, group_ms in sorted(groups.items(), key=lambda item: -item[1]):
        record_measurement(f"{name}: {group}", f"{group_ms:.2f} ms", f"{group_ms / total:.1%} of the kernels")
    record_measurement(f"{name}: host", f"{host_ms:.2f} ms", f"kernels {total:.2f} ms")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_training_step_breakdown(name, record):
    """Time and throughput of each part of a step; optimizers and moving average are not included in the parts."""
    run = load_preset(name, "bf16", "training.engine.kind=ddp")

    def work():
        training = TrainingSteps(run, DEVICE)
        stage, engines = training.stage, training.engines
        real = to_float(training.batch.values_B.to(DEVICE))
        fake = (real + 0.1 * torch.randn_like(real)).clamp(-1, 1).requires_grad_()

        def generator():
            output = stage.modules["generator"](real)
            return (output.images - real).abs().mean() + output.quantized.loss

        def discriminator(step):
            adversarial, fake_logits = stage._adversarial_term(fake, engines)
            context = DiscriminatorContext(real, fake_logits)
            return adversarial + stage._discriminator_loss(engines, context, step).loss

        parts = {
            "tokenizer": generator,
            "lpips": lambda: stage.perceptual(fake, real).mean(),
            "discriminator": lambda: discriminator(0),
            "discriminator-r1": lambda: discriminator(15),
        }

        def forward_and_backward(part):
            with autocast():
                loss = part()
            loss.backward()

        breakdown = {
            part_name: milliseconds(lambda part=part: forward_and_backward(part), 5, warm=2)
            for part_name, part in parts.items()
        }
        training.step(1)
        return (
            breakdown,
            milliseconds(lambda: training.step(2), 5, warm=2),
            busy_milliseconds(lambda: training.step(2)),
        )

    breakdown, _ = with_peak_memory(work)
    if breakdown is None:
        pytest.skip("the GPU's memory is insufficient")
    parts, step_ms, busy = breakdown
    size = run.model.image_size
    flops = make_plan(run, PLANNED_GPU, 1).sample.flops
    part_flops = {"tokenizer": flops["generator"], "lpips": flops["LPIPS"], "discriminator": flops["discriminator"]}
    for row_id, part_ms in (parts | {"step": step_ms, "busy": busy}).items():
        tflops = part_flops[row_id] * BATCH / part_ms / 1e9 if row_id in part_flops else None
        record("step-parts-h100", row_id, **{f"ms_{size}": part_ms, f"tflops_{size}": tflops})


@pytest.mark.parametrize("name", ["imagenet128-masked-lm", "imagenet128-prior"])
def test_token_model_training_step_speed(name, record):
    run = load_preset(name, "bf16", "training.engine.compile=false")
    seconds, peak = with_peak_memory(lambda: step_seconds(TrainingSteps, run))
    plan = make_plan(run, PLANNED_GPU, 1)
    record(
        "token-step-h100",
        name,
        step_s=seconds,
        memory_gb=peak,
        predicted_s=plan.step_s,
        time_ratio=plan.step_s / seconds,
        predicted_gb=plan.memory.total / 1e9,
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_reconstruction_speed(name, precision, record):
    """Encoding and decoding with weights in the given precision; the best of several batch sizes."""
    model_config = load_preset(name).model
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    tokenizer = Tokenizer(model_config).to(DEVICE, kind).eval()
    speeds = {}
    for batch in (BATCH,) if DRY_RUN else (8, 32, 128):
        images = torch.rand(batch, 3, model_config.image_size, model_config.image_size, device=DEVICE) * 2 - 1
        batch_ms = milliseconds(lambda images=images: tokenizer.decode(tokenizer.encode(images)), 5, warm=2)
        speeds[batch] = 1000 * batch / batch_ms
    record("reconstruction-h100", name, **{precision: max(speeds.values())}, published=PUBLISHED.get(name))


@pytest.mark.parametrize(("stride", "pad"), [(1, 2), (2, 1)], ids=["before a stride", "with the stride"])
def test_discriminator_blur_speed(stride, pad, record):
    """Low-pass filter of the first block of `imagenet128-bsq18` for 64 images, compared with a grouped convolution."""
    shape = (2, 16, 16, 16) if DRY_RUN else (64, 256, 128, 128)
    images_BCHW = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    taps = torch.tensor([1, 3, 3, 1], device=DEVICE, dtype=torch.bfloat16) / 8
    filter_C1HW = torch.outer(taps, taps).expand(shape[1], 1, 4, 4)
    triton_ms = milliseconds(lambda: blur(images_BCHW, stride, pad), 10)
    conv_ms = milliseconds(lambda: F.conv2d(images_BCHW, filter_C1HW, None, stride, pad, groups=shape[1]), 3)
    copy_ms = milliseconds(images_BCHW.clone, 10)
    speedup = conv_ms / triton_ms
    record("blur-h100", str(stride), stride=stride, ms=triton_ms, conv_ms=conv_ms, speedup=speedup, copy_ms=copy_ms)


def test_quantizer_speed(record):
    steps = quantizer_steps((2, 16) if DRY_RUN else (64, 1024), DEVICE)
    for row_id in QUANTIZERS:
        step_ms, peak = with_peak_memory(lambda row_id=row_id: milliseconds(steps[row_id], 20))
        if step_ms is not None:
            record("quantizer-h100", row_id, ms=step_ms, mb=1000 * peak)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_generation_speed(precision, record):
    """Throughput from classes to pixels, with the preset's steps and guidance."""
    run, tokenizer_config = load_preset("imagenet128-masked-lm"), load_preset("imagenet128-bsq18").model
    tokenizer, size = Tokenizer(tokenizer_config), tokenizer_config.image_size
    generator = Generator(MaskedLM(run.model).to(DEVICE), tokenizer.to(DEVICE), run.sampling)
    labels = list(range(BATCH))
    forward_ms = 0.0

    def timed(tokens_BNS, classes_BC):
        nonlocal forward_ms
        logits = []
        forward_ms += milliseconds(lambda: logits.append(generator.model(tokens_BNS, classes_BC)), 1, warm=0)
        return logits[0]

    with autocast(precision == "bf16"), torch.no_grad():
        total_ms = milliseconds(lambda: generator.generate(labels), 3, warm=1)
        pixels = torch.zeros(BATCH, 3, size, size, device=DEVICE)
        list(generator.iter_steps(labels, predict=timed, decode=lambda bits: pixels))
    rates = {"images_per_s": 1000 * BATCH / total_ms, "forward_images_per_s": 1000 * BATCH / forward_ms}
    record("sampler-h100", precision, **rates)


def test_prior_decoding_speed(record):
    """Decoding in fp32, as files require; without a cache every eighth pass is measured."""
    model_config = load_preset("imagenet128-prior").model
    prior, tiles, sampled = Prior(model_config).to(DEVICE).eval(), 8, 8
    shape = (tiles, model_config.num_tokens, model_config.num_sub_tokens)
    sub_tokens_BNS = torch.randint(0, 2**model_config.sub_bits, shape, device=DEVICE)

    def cached():
        decoding = prior.start_decoding(tiles)
        for n in range(model_config.num_tokens):
            h_B1D = decoding.next_features()
            for s in range(model_config.num_sub_tokens):
                prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s])
            decoding.push(sub_tokens_BNS[:, n])

    def uncached():
        for n in range(sampled // 2, model_config.num_tokens, sampled):
            prior(sub_tokens_BNS[:, : n + 1])

    with torch.no_grad():
        with_cache = milliseconds(cached, 1, warm=1) / 1000
        without = milliseconds(uncached, 1, warm=1) / 1000 * sampled
    tokens = tiles * model_config.num_tokens
    record("prior-decoding-h100", "cached", tokens_per_s=tokens / with_cache)
    record("prior-decoding-h100", "uncached", tokens_per_s=tokens / without)
