"""Training steps without the surrounding loop, on any device, and a naive baseline of the tokenizer's step."""

from unittest.mock import Mock

import torch
import torch.nn.functional as F

from bsq_ray.data.data_source import Batch
from bsq_ray.data.token_table import TokenSource
from bsq_ray.training.ema import EMA
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.stages import Stage, build_stage
from bsq_ray.training.stages.tokenizer_stage import TokenizerStage


def random_batch(run):
    """Return a batch of random samples in host memory, in the format of the loader."""
    size = run.training.batch_size
    if run.stage == "tokenizer":
        shape = (size, 3, run.model.image_size, run.model.image_size)
    else:
        shape = (size, run.model.num_tokens * run.model.bits // 8)
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    return Batch(values, torch.zeros(size, dtype=torch.int64), list(map(str, range(size))))


def build_stage_for(run, device) -> Stage:
    """Return the stage of a configuration; stages of token models get no table."""
    source = None if run.stage == "tokenizer" else Mock(spec=TokenSource, tokenizer_url="")
    return build_stage(run, source, device)


class TrainingSteps:
    """Training steps of a configuration with its engine and precision."""

    def __init__(self, run, device):
        self.stage, self.device = build_stage_for(run, device), device
        self.half = run.training.engine.precision == "bf16"
        training_config = run.training
        self.engines = {
            name: build_engine(
                module,
                training_config,
                micro_batch=training_config.batch_size,
                accumulation_steps=1,
                device=device,
                use_bf16=self.half,
            )
            for name, module in self.stage.modules.items()
        }
        self.main = next(iter(self.stage.modules.values()))
        self.ema = EMA(self.main, training_config.ema_decay)
        self.batch = random_batch(run)

    def step(self, number):
        [context] = self.stage.prepare_step([self.batch], self.engines, number)
        for phase in self.stage.phases(number):
            for name, module in self.stage.modules.items():
                module.requires_grad_(name == phase)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                output = self.stage.loss(phase, self.batch, self.engines, context, number)
            self.engines[phase].backward(output.loss)
            context = output.context
            self.engines[phase].step(1e-4)
        self.ema.update(self.main)


class NaiveConv(torch.nn.Module):
    """Convolution in the order of its description: pad, filter, then stride, in any memory layout."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=conv.weight.device) / 8
        self.filter_HW = torch.outer(taps, taps)

    def forward(self, x):
        conv, channels = self.conv, x.shape[1]
        weight = conv.weight * conv.scale
        if conv.downsample:
            taps = self.filter_HW.to(x.dtype).expand(channels, 1, 4, 4)
            pad = 1 if conv.kernel_size == 1 else 2
            x = F.conv2d(F.pad(x.contiguous(), (pad,) * 4), taps, groups=channels)
            x = F.conv2d(x, weight, stride=2)
        else:
            x = F.conv2d(x.contiguous(), weight, padding=conv.kernel_size // 2)
        if conv.bias is None:
            return x * conv.gain
        return F.leaky_relu(x + conv.bias.to(x.dtype)[:, None, None], 0.2) * 2**0.5 * conv.gain


class NaiveTrainingSteps:
    """Naive PyTorch version of the tokenizer's training step.

    Filter and stride are separate operations in the default memory layout. The discriminator is not frozen while the
    generator learns. The originals' perceptual features have gradients. Optimizers are not fused.
    """

    def __init__(self, run, device):
        stage = TokenizerStage(run, None, device)
        self.generator, self.discriminator = stage.modules["generator"], stage.modules["discriminator"]
        for module in list(self.discriminator.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__ == "EqualizedConv":
                    setattr(module, name, NaiveConv(child))
        self.optimizers = {
            name: torch.optim.AdamW(module.parameters(), lr=1e-4, foreach=False)
            for name, module in stage.modules.items()
        }
        [lpips] = stage.perceptual.networks
        self.perceptual = lpips.to(memory_format=torch.contiguous_format)
        self.batch, self.device = random_batch(run), device
        self.half = run.training.engine.precision == "bf16"

    def step(self, number):
        x = self.batch.values_B.to(self.device).float() / 127.5 - 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            output = self.generator(x)
            fake = output.images.clamp(-1, 1)
            loss = (output.images - x).abs().mean() + 0.1 * self.perceptual(fake, x.requires_grad_()).mean()
            loss = loss + 0.1 * F.softplus(-self.discriminator(fake)[0]).mean() + 0.1 * output.quantized.loss
        loss.backward()
        self.optimizers["generator"].step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            real_images = x.detach().requires_grad_()
            real, fake = self.discriminator(real_images)[0], self.discriminator(fake.detach())[0]
            loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
            if (number + 1) % 16 == 0:
                [gradient] = torch.autograd.grad(real.sum(), real_images, create_graph=True)
                loss = loss + 80 * gradient.square().sum((1, 2, 3)).mean()
        loss.backward()
        self.optimizers["discriminator"].step()
        self.optimizers["discriminator"].zero_grad()
