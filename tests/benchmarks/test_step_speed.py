"""One full training step: generator, LPIPS (VGG), discriminator, R1 amortised over its 16 steps, both optimisers.

Width 256, 6 + 6 layers, 128 px, batch 4, StyleGAN2 discriminator with channel base 32,768. The neighbour is the same
step spelt without care: filter and stride apart in the default memory layout, discriminator not frozen while the
generator learns, originals' perceptual features with gradients, optimisers not fused.
"""

import resource
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from bsq_ray import config
from bsq_ray.data.source import Batch
from bsq_ray.training.engine import DataParallelEngine
from bsq_ray.training.stages.tokenizer import TokenizerStage

pytestmark = pytest.mark.benchmark
_SIZE, _BATCH = 128, 4


def configuration(compiled=False):
    sizes = {"width": 256, "layers": 6, "heads": 4}
    return config.TokenizerConfig(
        name="step",
        model=config.TokenizerModel(encoder=config.Transformer(**sizes), decoder=config.Decoder(**sizes)),
        training=config.Training(engine=config.Engine(compile=compiled)),
    )


def batch():
    images = torch.randint(0, 256, (_BATCH, 3, _SIZE, _SIZE), dtype=torch.uint8)
    return Batch(images, torch.zeros(_BATCH, dtype=torch.int64), ["x"] * _BATCH)


def careful(precision, compiled):
    stage = TokenizerStage(configuration(compiled), torch.device("cpu"))
    engines = {
        name: DataParallelEngine(module, torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True), 0.0, 1)
        for name, module in stage.modules.items()
    }

    def step(number):
        carry = {}
        for phase in stage.phases(number):
            for name, module in stage.modules.items():
                module.requires_grad_(name == phase)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = stage.loss(phase, batch(), engines, carry, number)
            engines[phase].backward(loss)
            engines[phase].step(1e-4)

    return step


class CarelessConv(torch.nn.Module):
    """The literal order of the description: pad, filter, then stride, on whatever layout comes."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        conv, channels = self.conv, x.shape[1]
        weight = conv.weight * conv.scale
        if conv.down:
            taps = conv.filter_HW.to(x.dtype).expand(channels, 1, 4, 4)
            pad = 1 if conv.size == 1 else 2
            x = F.conv2d(F.pad(x.contiguous(), (pad,) * 4), taps, groups=channels)
            x = F.conv2d(x, weight, stride=2)
        else:
            x = F.conv2d(x.contiguous(), weight, padding=conv.size // 2)
        if conv.bias is None:
            return x * conv.gain
        return F.leaky_relu(x + conv.bias.to(x.dtype)[:, None, None], 0.2) * 2**0.5 * conv.gain


def careless(precision):
    stage = TokenizerStage(configuration(), torch.device("cpu"))
    discriminator = stage.modules["discriminator"]
    for module in list(discriminator.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "EqualizedConv":
                setattr(module, name, CarelessConv(child))
    optimisers = {n: torch.optim.AdamW(m.parameters(), lr=1e-4, foreach=False) for n, m in stage.modules.items()}
    perceptual = stage.perceptual.lpips.to(memory_format=torch.contiguous_format)

    def step(number):
        x = batch().values_B.float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = stage.modules["generator"](x)
            fake = output.images.clamp(-1, 1)
            loss = (output.images - x).abs().mean() + 0.1 * perceptual(fake, x.requires_grad_()).mean()
            loss = loss + 0.1 * F.softplus(-discriminator(fake)[0]).mean() + 0.1 * output.quantized.loss
        loss.backward()
        optimisers["generator"].step()
        for optimiser in optimisers.values():
            optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            real_images = x.detach().requires_grad_()
            real, fake = discriminator(real_images)[0], discriminator(fake.detach())[0]
            loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
            if (number + 1) % 16 == 0:
                [gradient] = torch.autograd.grad(real.sum(), real_images, create_graph=True)
                loss = loss + 80 * gradient.square().sum((1, 2, 3)).mean()
        loss.backward()
        optimisers["discriminator"].step()
        optimisers["discriminator"].zero_grad()

    return step


def measure(kind, precision, compiled):
    """Seconds of an average step, and the process's peak memory in GB."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    step = careful(precision, compiled) if kind == "careful" else careless(precision)
    step(0)
    times = []
    for number in (1, 2, 15):
        began = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began)
    average = min(times[:2]) * 15 / 16 + times[2] / 16
    return average, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def test_step_speed(figure):
    cases = [
        ("careless", "fp32", False),
        ("careful", "fp32", False),
        ("careful", "fp32", True),
        ("careless", "bf16", False),
        ("careful", "bf16", False),
        ("careful", "bf16", True),
    ]
    seconds = {}
    for case in cases:
        # A process of its own for each, so that peak memory is its own.
        call = f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r}); import test_step_speed as t; "
        call += f"print(*t.measure(*{case!r}))"
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
        value, memory = map(float, done.stdout.split()[-2:])
        seconds[case] = value
        kind, precision, compiled = case
        name = "careless neighbour" if kind == "careless" else "bsq_ray"
        name += f", {precision}, {'compiled' if compiled else 'eager'}"
        ratio = seconds["careless", precision, False] / value
        what = f"full training step, {_SIZE} px, batch {_BATCH}: {name}"
        figure(what, f"{value:.2f} s, {memory:.2f} GB", f"{ratio:.2f} x the careless neighbour's speed")
