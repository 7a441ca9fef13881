"""What a GPU takes for the presets: steps, reconstruction, quantisers, drawing, decoding; plans and neighbours beside.

fp32 is fp32 (no TF32), also in the neighbours. Weights are random and images are noise: neither changes the time. Times
are medians, R1 counts for the sixteenth step that it comes in; memory is the most that PyTorch's allocator held.
"""

import gc
import statistics

import pytest
import torch
import torch.nn.functional as F
from quantizer_steps import quantizer_steps
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training_steps import NaiveTrainingSteps, TrainingSteps

from bsq_ray import Generator, Prior, Tokenizer
from bsq_ray.config import load_config
from bsq_ray.data.transforms import to_float
from bsq_ray.metrics.pretrained_weights import resolve_once
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.ops.blur import blur
from bsq_ray.planning.planner import make_plan, reconstruction_rate
from bsq_ray.runtime.precision import strict_fp32

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark]
DEVICE = torch.device("cuda", 0)
# The card of the plans, whatever runs here.
PLANNED_GPU = "h100"
BATCH = 32
TOKENIZERS = ("imagenet128-bsq18", "imagenet256-bsq18")
# Images per second on an A5000 that the paper publishes, by preset.
PUBLISHED = {"imagenet256-bsq18": 45.1}


@pytest.fixture(autouse=True)
def reset_gpu_state():
    torch.cuda.init()
    strict_fp32()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def milliseconds(call, times, warm=3):
    """Median time of a call, by the GPU's own clock."""
    for _ in range(warm):
        call()
    durations = []
    for _ in range(times):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        durations.append(began.elapsed_time(ended))
    return statistics.median(durations)


def gpu_busy_milliseconds(call):
    """Time that a GPU calculates in a call, whether or not it waits in between."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in kernels if not event.is_user_annotation) / 1000


def with_peak_memory(work):
    """What `work` returns, and the GB that it held at most; None where the GPU has not so much."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    try:
        made = work()
    except torch.OutOfMemoryError:
        return None, 0.0
    return made, (torch.cuda.max_memory_allocated(DEVICE) - before) / 1e9


def step_seconds(kind, run):
    """Of an average one, after a few that warm up; every sixteenth has the R1 penalty."""
    training = kind(run, DEVICE)
    for number in (0, 15, 1):
        training.step(number)
    without_r1 = milliseconds(lambda: training.step(2), 5, warm=0)
    with_r1 = milliseconds(lambda: training.step(15), 3, warm=0)
    return (without_r1 * 15 + with_r1) / 16 / 1000


def load_preset(name, precision, *more):
    return load_config(name, [f"training.batch_size={BATCH}", f"training.engine.precision={precision}", *more])


NAIVE_SECONDS = {}


@pytest.mark.parametrize("way", ["careless", "eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_full_training_step_speed(name, precision, way, record_measurement):
    """Generator, LPIPS (VGG), discriminator, R1, both optimisers, moving average: everything but reading."""
    if (way, precision) == ("compiled", "fp32"):
        pytest.skip("products are all there is to it")
    resolve_once("lpips-vgg")
    run = load_preset(name, precision, f"training.engine.compile={'true' if way == 'compiled' else 'false'}")
    kind = NaiveTrainingSteps if way == "careless" else TrainingSteps
    seconds, peak = with_peak_memory(lambda: step_seconds(kind, run))
    label = "careless neighbour" if way == "careless" else f"bsq_ray, {way}"
    what = f"full training step, {name}, {BATCH} images, {precision}: {label}"
    if seconds is None:
        record_measurement(what, "more memory than there is")
        return
    plan = make_plan(run, PLANNED_GPU, 1)
    comparison = f"planned {plan.step_seconds:.3f} s, {plan.memory.total / 1e9:.1f} GB"
    if way == "careless":
        NAIVE_SECONDS[name, precision] = seconds
        comparison = ""
    elif (name, precision) in NAIVE_SECONDS:
        comparison = f"{NAIVE_SECONDS[name, precision] / seconds:.2f} x the neighbour's speed; {comparison}"
    speed = f"{BATCH / seconds:.0f} images/s, {plan.step_flops / seconds / 1e12:.0f} TFLOP/s"
    record_measurement(what, f"{seconds:.3f} s, {speed}, {peak:.1f} GB", comparison)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_training_step_breakdown(name, record_measurement):
    """Where its time goes, and how fast each part calculates; optimisers and moving average are in none of them."""
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
            carry = {"real": real}
            judged = stage._judge(fake, engines, carry)
            return judged + stage._discriminator_loss(engines, carry, step)[0]

        parts = {
            "generator": generator,
            "LPIPS": lambda: stage.perceptual(fake, real).mean(),
            "discriminator": lambda: discriminator(0),
            "discriminator with R1": lambda: discriminator(15),
        }

        def both_ways(part):
            with torch.autocast("cuda", torch.bfloat16):
                loss = part()
            loss.backward()

        breakdown = {
            part_name: milliseconds(lambda part=part: both_ways(part), 5, warm=2) for part_name, part in parts.items()
        }
        training.step(1)
        return (
            breakdown,
            milliseconds(lambda: training.step(2), 5, warm=2),
            gpu_busy_milliseconds(lambda: training.step(2)),
        )

    breakdown, _ = with_peak_memory(work)
    if breakdown is None:
        pytest.skip("more memory than there is")
    parts, step_ms, busy = breakdown
    record_measurement(
        f"a training step, {name}, {BATCH} images, bf16, eager, plain data parallelism",
        f"{step_ms:.1f} ms",
        f"the GPU calculates for {busy:.1f} ms of it",
    )
    operations = make_plan(run, PLANNED_GPU, 1).sample.flops
    for part_name, part_ms in parts.items():
        speed = f"{operations[part_name] * BATCH / part_ms / 1e9:.0f} TFLOP/s" if part_name in operations else ""
        record_measurement(
            f"of a training step, {name}, {BATCH} images, bf16, eager: {part_name}", f"{part_ms:.1f} ms", speed
        )


@pytest.mark.parametrize("name", ["imagenet128-masked-lm", "imagenet128-prior"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_token_model_training_step_speed(name, way, record_measurement):
    run = load_preset(name, "bf16", f"training.engine.compile={'true' if way == 'compiled' else 'false'}")
    seconds, peak = with_peak_memory(lambda: step_seconds(TrainingSteps, run))
    plan = make_plan(run, PLANNED_GPU, 1)
    speed = f"{BATCH / seconds:.0f} images/s, {plan.step_flops / seconds / 1e12:.0f} TFLOP/s"
    record_measurement(
        f"training step, {name}, {BATCH} images, bf16, {way}",
        f"{seconds:.3f} s, {speed}, {peak:.1f} GB",
        f"planned {plan.step_seconds:.3f} s, {plan.memory.total / 1e9:.1f} GB",
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_reconstruction_speed(name, precision, record_measurement):
    """Encoding and decoding, weights in the precision named; the best of several batches."""
    section = load_config(name).model
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    tokenizer = Tokenizer(section).to(DEVICE, kind).eval()
    speeds = {}
    for batch in (8, 32, 128):
        images = torch.rand(batch, 3, section.image_size, section.image_size, device=DEVICE) * 2 - 1
        batch_ms = milliseconds(lambda images=images: tokenizer.decode(tokenizer.encode(images)), 5, warm=2)
        speeds[batch] = 1000 * batch / batch_ms
    best = max(speeds, key=speeds.get)
    comparison = [f"planned {reconstruction_rate(section, PLANNED_GPU):.0f}"] if precision == "bf16" else []
    if name in PUBLISHED:
        comparison.append(f"published {PUBLISHED[name]} on an A5000")
    record_measurement(
        f"reconstruction, {name}, {precision}, {best} at once", f"{speeds[best]:.0f} images/s", "; ".join(comparison)
    )


@pytest.mark.parametrize(("stride", "pad"), [(1, 2), (2, 1)], ids=["before a stride", "with the stride"])
def test_discriminator_blur_speed(stride, pad, record_measurement):
    """As the first block of `imagenet128-bsq18` takes it for 64 images, beside PyTorch's convolution in groups."""
    shape = (64, 256, 128, 128)
    images_BCHW = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    taps = torch.tensor([1, 3, 3, 1], device=DEVICE, dtype=torch.bfloat16) / 8
    filter_C1HW = torch.outer(taps, taps).expand(shape[1], 1, 4, 4)
    triton_ms = milliseconds(lambda: blur(images_BCHW, stride, pad), 10)
    library = milliseconds(lambda: F.conv2d(images_BCHW, filter_C1HW, None, stride, pad, groups=shape[1]), 3)
    copy = milliseconds(images_BCHW.clone, 10)
    what = f"the discriminator's filter, stride {stride}, {shape[0]} x {shape[1]} channels of {shape[2]} px, bf16"
    record_measurement(
        what,
        f"{triton_ms:.2f} ms",
        f"convolution in groups {library:.2f} ms: {library / triton_ms:.1f} x; a copy {copy:.2f} ms",
    )


def test_quantizer_speed(record_measurement):
    shape = (64, 1024)
    steps = quantizer_steps(shape, DEVICE)
    base = None
    for name, step in steps.items():
        step_ms, peak = with_peak_memory(lambda step=step: milliseconds(step, 20))
        what = f"quantiser, forward + backward, {shape[0] * shape[1]:,} tokens: {name}"
        if step_ms is None:
            record_measurement(what, "more memory than there is")
            continue
        base = base or step_ms
        record_measurement(what, f"{step_ms:.2f} ms, {1000 * peak:.0f} MB", f"{step_ms / base:.2f} x BSQ 18 bits")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_generation_speed(precision, record_measurement):
    """Classes to pixels, with the preset's steps and guidance."""
    run, tokenizer = load_config("imagenet128-masked-lm"), Tokenizer(load_config("imagenet128-bsq18").model)
    generator = Generator(MaskedLM(run.model).to(DEVICE), tokenizer.to(DEVICE), run.sampling)
    labels = list(range(BATCH))
    inside = 0.0

    def timed(tokens_BNS, classes_BC):
        nonlocal inside
        torch.cuda.synchronize()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        logits = generator.model(tokens_BNS, classes_BC)
        ended.record()
        torch.cuda.synchronize()
        inside += began.elapsed_time(ended)
        return logits

    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
        whole = milliseconds(lambda: generator.generate(labels), 3, warm=1)
        list(generator.steps(labels, predict=timed, decode=lambda bits: torch.zeros(BATCH, 3, 128, 128, device=DEVICE)))
    steps = f"{BATCH} images in {run.sampling.steps} guided steps"
    what = f"drawing and decoding, imagenet128-masked-lm, {steps}, {precision}"
    record_measurement(
        what, f"{1000 * BATCH / whole:.0f} images/s", f"the forward passes alone {1000 * BATCH / inside:.0f}"
    )


def test_prior_decoding_speed(record_measurement):
    """In fp32, as files need it; every eighth pass of those without a cache."""
    section = load_config("imagenet128-prior").model
    prior, tiles, sampled = Prior(section).to(DEVICE).eval(), 8, 8
    shape = (tiles, section.tokens, section.sub_tokens)
    sub_tokens_BNS = torch.randint(0, 2**section.sub_bits, shape, device=DEVICE)

    def cached():
        decoding = prior.start_decoding(tiles)
        for n in range(section.tokens):
            h_B1D = decoding.features()
            for s in range(section.sub_tokens):
                prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s])
            decoding.push(sub_tokens_BNS[:, n])

    def uncached():
        for n in range(sampled // 2, section.tokens, sampled):
            prior(sub_tokens_BNS[:, : n + 1])

    with torch.no_grad():
        with_cache = milliseconds(cached, 1, warm=1) / 1000
        without = milliseconds(uncached, 1, warm=1) / 1000 * sampled
    tokens = tiles * section.tokens
    what = f"prior, imagenet128-prior, decoding {tiles} tiles of {section.tokens} tokens, fp32"
    comparison = f"without cache {tokens / without:.0f} tokens/s, {without / with_cache:.1f} times as long"
    record_measurement(what, f"{tokens / with_cache:.0f} tokens/s", comparison)
