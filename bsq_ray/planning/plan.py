"""A run before it is started: does it fit, how long does it take, what must disks and network deliver."""

from __future__ import annotations

from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.planning.flops import StepFlops, step_flops, tokenizer_forward
from bsq_ray.planning.gpus import GPU, find_gpu
from bsq_ray.planning.memory import Memory, discriminator_phase, generator_phase, tokenizer_bytes, training_memory
from bsq_ray.planning.network import bytes_sent, seconds_sending
from bsq_ray.planning.networks import discriminator_parameters, tokenizer_parameters

# Share of the peak at which matrix products run. The one published measurement of this network, 45.1 images/s of
# reconstruction at 256 px on an A5000, means this.
EFFICIENCY = 0.19
# An ImageNet JPEG as published (138 GB of 1.28 million images).
_IMAGE_BYTES = 110_000


@dataclass(frozen=True)
class Plan:
    """What a run needs; sizes in bytes, times in seconds.

    Attributes:
        name: of the configuration.
        gpu, gpus: the card and how many.
        generator_parameters, discriminator_parameters: trained parameters.
        micro_batch, accumulation: images a GPU takes at once, and how often in a step.
        memory: of one GPU.
        flops: of one image.
        step_flops: of a step, all GPUs together.
        compute_seconds, network_seconds: of a step; they are not counted as overlapping.
        bytes_sent: by each GPU in a step.
        data_bytes: compressed images per second, all GPUs together.
        days: to the last step.
        advice: what to change if it does not fit, each with the override that does it.
    """

    name: str
    gpu: GPU
    gpus: int
    generator_parameters: int
    discriminator_parameters: int
    micro_batch: int
    accumulation: int
    memory: Memory
    flops: StepFlops
    step_flops: float
    compute_seconds: float
    network_seconds: float
    bytes_sent: float
    data_bytes: float
    images_per_second: float
    days: float
    advice: tuple[str, ...]

    @property
    def step_seconds(self) -> float:
        """Computing, then sending."""
        return self.compute_seconds + self.network_seconds

    @property
    def fits(self) -> bool:
        """Whether the card's memory holds it."""
        return self.memory.total <= self.gpu.memory_gib * 2**30


def plan(
    run: config.TokenizerConfig,
    gpu: str,
    gpus: int,
    network_gbit: float = 25.0,
    gpus_per_server: int = 8,
    efficiency: float = EFFICIENCY,
) -> Plan:
    """Plans a run.

    Args:
        gpu: name of a card, see `gpus.GPUS`.
        gpus: workers; each has one.
        network_gbit: between servers, 1e9 bits per second and direction.
        gpus_per_server: cards of one server.
        efficiency: share of the card's peak that matrix products reach, 0 to 1.

    Raises:
        ValueError: an unknown card, numbers out of range, or a batch that the workers cannot share evenly.
    """
    from bsq_ray.training.job import split_batch

    card = find_gpu(gpu)
    if gpus < 1 or gpus_per_server < 1:
        raise ValueError(f"gpus {gpus} and gpus per server {gpus_per_server} must be 1 or more")
    if not 0 < efficiency <= 1 or network_gbit <= 0:
        raise ValueError(f"efficiency {efficiency} must be in (0, 1] and the network's {network_gbit} Gbit/s positive")
    section = run.training
    micro_batch, accumulation = split_batch(section, gpus)
    generator = tokenizer_parameters(run.model)
    discriminator = discriminator_parameters(run.loss.adversarial, run.model.image_size)
    flops = step_flops(run)
    images = micro_batch * accumulation
    compute = images * _compute_seconds(run, card, efficiency)
    sent = bytes_sent(generator + discriminator, section.engine, gpus, accumulation)
    sending = seconds_sending(sent, gpus, gpus_per_server, card.link, network_gbit)
    memory = training_memory(run, gpus, micro_batch)
    seconds = compute + sending
    return Plan(
        name=run.name,
        gpu=card,
        gpus=gpus,
        generator_parameters=generator,
        discriminator_parameters=discriminator,
        micro_batch=micro_batch,
        accumulation=accumulation,
        memory=memory,
        flops=flops,
        step_flops=flops.total * section.batch_size,
        compute_seconds=compute,
        network_seconds=sending,
        bytes_sent=sent,
        data_bytes=section.batch_size * run.model.frames * _IMAGE_BYTES / seconds,
        images_per_second=section.batch_size / seconds,
        days=section.steps * seconds / 86400,
        advice=_advice(run, card, gpus, micro_batch) if memory.total > card.memory_gib * 2**30 else (),
    )


def reconstruction_rate(model: config.TokenizerModel, gpu: str, efficiency: float = EFFICIENCY) -> float:
    """Images one card encodes and decodes per second, in bf16."""
    card = find_gpu(gpu)
    products = tokenizer_forward(model) / (card.bf16_tflops * 1e12 * efficiency)
    # Without a backward pass every activation is written and read once.
    return 1 / (products + 2 * tokenizer_bytes(model, half=True) / (card.bandwidth * 1e9))


def _compute_seconds(run: config.TokenizerConfig, card: GPU, efficiency: float) -> float:
    """Of one image: products at a share of the peak, then memory traffic.

    Each activation is written, read by the next layer, read by the backward pass, and its gradient written. What is not
    a product is bound by memory: Ivanov et al., "Data Movement Is All You Need", 2021.
    """
    half = run.training.engine.precision != "fp32"
    peak = (card.bf16_tflops if half else card.fp32_tflops) * 1e12
    kept = generator_phase(run) + discriminator_phase(run)
    return step_flops(run).total / (peak * efficiency) + 4 * kept / (card.bandwidth * 1e9)


def _advice(run: config.TokenizerConfig, card: GPU, gpus: int, micro_batch: int) -> tuple[str, ...]:
    """Changes that make it fit, each by itself unless it says otherwise."""
    found = []
    checkpointed = run.model_copy(update={"model": run.model.model_copy(update={"gradient_checkpointing": True})})
    whole = _largest_that_fits(run, card, gpus, micro_batch)
    if whole:
        found.append(f"training.micro_batch_size={whole} (accumulates; same global batch)")
    less = _largest_that_fits(checkpointed, card, gpus, micro_batch)
    if not run.model.gradient_checkpointing and less:
        smaller = f" training.micro_batch_size={less}" if less < micro_batch else ""
        found.append(f"model.gradient_checkpointing=true{smaller} (a third more compute)")
    if not found:
        found.append("a card with more memory, or a smaller model: not even one image at a time fits")
    return tuple(found)


def _largest_that_fits(run: config.TokenizerConfig, card: GPU, gpus: int, share: int) -> int:
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    fitting = (size for size in sizes if training_memory(run, gpus, size).total <= card.memory_gib * 2**30)
    return next(fitting, 0)
