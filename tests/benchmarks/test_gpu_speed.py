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
from training_steps import CarelessTraining, Training

from bsq_ray import Generator, Prior, Tokenizer
from bsq_ray.config import load_config
from bsq_ray.data.transforms import to_float
from bsq_ray.metrics.pretrained_weights import resolve_once
from bsq_ray.models.masked_lm import MaskedLM
from bsq_ray.models.ops.blur import blur
from bsq_ray.planning.planner import plan, reconstruction_rate
from bsq_ray.runtime.precision import strict_fp32

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark]
GPU = torch.device("cuda", 0)
# The card of the plans, whatever runs here.
PLANNED = "h100"
BATCH = 32
TOKENIZERS = ("imagenet128-bsq18", "imagenet256-bsq18")
# Images per second on an A5000 that the paper publishes, by preset.
PUBLISHED = {"imagenet256-bsq18": 45.1}


@pytest.fixture(autouse=True)
def _on_an_empty_gpu():
    torch.cuda.init()
    strict_fp32()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def milliseconds(call, times, warm=3):
    """Median time of a call, by the GPU's own clock."""
    for _ in range(warm):
        call()
    found = []
    for _ in range(times):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended))
    return statistics.median(found)


def busy_milliseconds(call):
    """Time that a GPU calculates in a call, whether or not it waits in between."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in kernels if not event.is_user_annotation) / 1000


def alone(work):
    """What `work` returns, and the GB that it held at most; None where the GPU has not so much."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    try:
        made = work()
    except torch.OutOfMemoryError:
        return None, 0.0
    return made, (torch.cuda.max_memory_allocated(GPU) - before) / 1e9


def seconds_of_a_step(kind, run):
    """Of an average one, after a few that warm up; every sixteenth has the R1 penalty."""
    training = kind(run, GPU)
    for number in (0, 15, 1):
        training.step(number)
    usual = milliseconds(lambda: training.step(2), 5, warm=0)
    penalised = milliseconds(lambda: training.step(15), 3, warm=0)
    return (usual * 15 + penalised) / 16 / 1000


def preset(name, precision, *more):
    return load_config(name, [f"training.batch_size={BATCH}", f"training.engine.precision={precision}", *more])


CARELESS = {}


@pytest.mark.parametrize("way", ["careless", "eager", "compiled"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_full_training_step(name, precision, way, figure):
    """Generator, LPIPS (VGG), discriminator, R1, both optimisers, moving average: everything but reading."""
    if (way, precision) == ("compiled", "fp32"):
        pytest.skip("products are all there is to it")
    resolve_once("lpips-vgg")
    run = preset(name, precision, f"training.engine.compile={'true' if way == 'compiled' else 'false'}")
    kind = CarelessTraining if way == "careless" else Training
    seconds, peak = alone(lambda: seconds_of_a_step(kind, run))
    told = "careless neighbour" if way == "careless" else f"bsq_ray, {way}"
    what = f"full training step, {name}, {BATCH} images, {precision}: {told}"
    if seconds is None:
        figure(what, "more memory than there is")
        return
    planned = plan(run, PLANNED, 1)
    beside = f"planned {planned.step_seconds:.3f} s, {planned.memory.total / 1e9:.1f} GB"
    if way == "careless":
        CARELESS[name, precision] = seconds
        beside = ""
    elif (name, precision) in CARELESS:
        beside = f"{CARELESS[name, precision] / seconds:.2f} x the neighbour's speed; {beside}"
    speed = f"{BATCH / seconds:.0f} images/s, {planned.step_flops / seconds / 1e12:.0f} TFLOP/s"
    figure(what, f"{seconds:.3f} s, {speed}, {peak:.1f} GB", beside)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_of_a_training_step(name, figure):
    """Where its time goes, and how fast each part calculates; optimisers and moving average are in none of them."""
    run = preset(name, "bf16", "training.engine.kind=ddp")

    def work():
        training = Training(run, GPU)
        stage, engines = training.stage, training.engines
        real = to_float(training.batch.values_B.to(GPU))
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

        found = {told: milliseconds(lambda part=part: both_ways(part), 5, warm=2) for told, part in parts.items()}
        training.step(1)
        return found, milliseconds(lambda: training.step(2), 5, warm=2), busy_milliseconds(lambda: training.step(2))

    found, _ = alone(work)
    if found is None:
        pytest.skip("more memory than there is")
    parts, by_the_clock, busy = found
    figure(
        f"a training step, {name}, {BATCH} images, bf16, eager, plain data parallelism",
        f"{by_the_clock:.1f} ms",
        f"the GPU calculates for {busy:.1f} ms of it",
    )
    operations = plan(run, PLANNED, 1).sample.flops
    for told, took in parts.items():
        speed = f"{operations[told] * BATCH / took / 1e9:.0f} TFLOP/s" if told in operations else ""
        figure(f"of a training step, {name}, {BATCH} images, bf16, eager: {told}", f"{took:.1f} ms", speed)


@pytest.mark.parametrize("name", ["imagenet128-masked-lm", "imagenet128-prior"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_training_step_on_tokens(name, way, figure):
    run = preset(name, "bf16", f"training.engine.compile={'true' if way == 'compiled' else 'false'}")
    seconds, peak = alone(lambda: seconds_of_a_step(Training, run))
    planned = plan(run, PLANNED, 1)
    speed = f"{BATCH / seconds:.0f} images/s, {planned.step_flops / seconds / 1e12:.0f} TFLOP/s"
    figure(
        f"training step, {name}, {BATCH} images, bf16, {way}",
        f"{seconds:.3f} s, {speed}, {peak:.1f} GB",
        f"planned {planned.step_seconds:.3f} s, {planned.memory.total / 1e9:.1f} GB",
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_reconstruction(name, precision, figure):
    """Encoding and decoding, weights in the precision named; the best of several batches."""
    section = load_config(name).model
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    tokenizer = Tokenizer(section).to(GPU, kind).eval()
    speeds = {}
    for batch in (8, 32, 128):
        images = torch.rand(batch, 3, section.image_size, section.image_size, device=GPU) * 2 - 1
        took = milliseconds(lambda images=images: tokenizer.decode(tokenizer.encode(images)), 5, warm=2)
        speeds[batch] = 1000 * batch / took
    best = max(speeds, key=speeds.get)
    beside = [f"planned {reconstruction_rate(section, PLANNED):.0f}"] if precision == "bf16" else []
    if name in PUBLISHED:
        beside.append(f"published {PUBLISHED[name]} on an A5000")
    figure(f"reconstruction, {name}, {precision}, {best} at once", f"{speeds[best]:.0f} images/s", "; ".join(beside))


@pytest.mark.parametrize(("stride", "pad"), [(1, 2), (2, 1)], ids=["before a stride", "with the stride"])
def test_the_discriminators_filter(stride, pad, figure):
    """As the first block of `imagenet128-bsq18` takes it for 64 images, beside PyTorch's convolution in groups."""
    shape = (64, 256, 128, 128)
    images_BCHW = torch.randn(shape, device=GPU, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    taps = torch.tensor([1, 3, 3, 1], device=GPU, dtype=torch.bfloat16) / 8
    filter_C1HW = torch.outer(taps, taps).expand(shape[1], 1, 4, 4)
    ours = milliseconds(lambda: blur(images_BCHW, stride, pad), 10)
    library = milliseconds(lambda: F.conv2d(images_BCHW, filter_C1HW, None, stride, pad, groups=shape[1]), 3)
    copy = milliseconds(images_BCHW.clone, 10)
    what = f"the discriminator's filter, stride {stride}, {shape[0]} x {shape[1]} channels of {shape[2]} px, bf16"
    figure(
        what, f"{ours:.2f} ms", f"convolution in groups {library:.2f} ms: {library / ours:.1f} x; a copy {copy:.2f} ms"
    )


def test_quantizers(figure):
    shape = (64, 1024)
    steps = quantizer_steps(shape, GPU)
    base = None
    for name, step in steps.items():
        took, peak = alone(lambda step=step: milliseconds(step, 20))
        what = f"quantiser, forward + backward, {shape[0] * shape[1]:,} tokens: {name}"
        if took is None:
            figure(what, "more memory than there is")
            continue
        base = base or took
        figure(what, f"{took:.2f} ms, {1000 * peak:.0f} MB", f"{took / base:.2f} x BSQ 18 bits")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_drawing(precision, figure):
    """Classes to pixels, with the preset's steps and guidance."""
    run, tokenizer = load_config("imagenet128-masked-lm"), Tokenizer(load_config("imagenet128-bsq18").model)
    generator = Generator(MaskedLM(run.model).to(GPU), tokenizer.to(GPU), run.sampling)
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
        list(generator.steps(labels, predict=timed, decode=lambda bits: torch.zeros(BATCH, 3, 128, 128, device=GPU)))
    steps = f"{BATCH} images in {run.sampling.steps} guided steps"
    what = f"drawing and decoding, imagenet128-masked-lm, {steps}, {precision}"
    figure(what, f"{1000 * BATCH / whole:.0f} images/s", f"the forward passes alone {1000 * BATCH / inside:.0f}")


def test_decoding_by_the_prior(figure):
    """In fp32, as files need it; every eighth pass of those without a cache."""
    section = load_config("imagenet128-prior").model
    prior, tiles, sampled = Prior(section).to(GPU).eval(), 8, 8
    shape = (tiles, section.tokens, section.sub_tokens)
    sub_tokens_BNS = torch.randint(0, 2**section.sub_bits, shape, device=GPU)

    def cached():
        decoding = prior.start_decoding(tiles)
        for n in range(section.tokens):
            h_B1D = decoding.features()
            for s in range(section.sub_tokens):
                prior.node_logits(h_B1D, sub_tokens_BNS[:, n : n + 1, :s])
            decoding.push(sub_tokens_BNS[:, n])

    def anew():
        for n in range(sampled // 2, section.tokens, sampled):
            prior(sub_tokens_BNS[:, : n + 1])

    with torch.no_grad():
        with_cache = milliseconds(cached, 1, warm=1) / 1000
        without = milliseconds(anew, 1, warm=1) / 1000 * sampled
    tokens = tiles * section.tokens
    what = f"prior, imagenet128-prior, decoding {tiles} tiles of {section.tokens} tokens, fp32"
    beside = f"without cache {tokens / without:.0f} tokens/s, {without / with_cache:.1f} times as long"
    figure(what, f"{tokens / with_cache:.0f} tokens/s", beside)
