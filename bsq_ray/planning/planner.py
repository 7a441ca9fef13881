"""A run before it is started: does it fit, how long does it take, what must disks and network deliver."""

from __future__ import annotations

from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.planning.activations import tokenizer_bytes
from bsq_ray.planning.communication import bytes_sent, seconds_sending
from bsq_ray.planning.flops import tokenizer_forward
from bsq_ray.planning.gpus import GPU, find_gpu
from bsq_ray.planning.memory import Memory, training_memory
from bsq_ray.planning.requirements import Needs, needs

# Share of the peak at which matrix products run. The one published measurement of this network, 45.1 images/s of
# reconstruction at 256 px on an A5000, means this.
EFFICIENCY = 0.19


@dataclass(frozen=True)
class Plan:
    """What a run needs; sizes in bytes, times in seconds.

    Attributes:
        name: of the configuration.
        gpu, gpus: the card and how many.
        sample: what one image, clip or row of tokens needs.
        micro_batch, accumulation: samples a GPU takes at once, and how often in a step.
        memory: of one GPU.
        step_flops: of a step, all GPUs together.
        compute_seconds, network_seconds: of a step; they are not counted as overlapping.
        bytes_sent: by each GPU in a step.
        data_bytes: read per second, all GPUs together.
        samples_per_second: trained on, all GPUs together.
        days: to the last step.
        advice: what to change if it does not fit, each with the override that does it.
    """

    name: str
    gpu: GPU
    gpus: int
    sample: Needs
    micro_batch: int
    accumulation: int
    memory: Memory
    step_flops: float
    compute_seconds: float
    network_seconds: float
    bytes_sent: float
    data_bytes: float
    samples_per_second: float
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
    run: config.AnyConfig,
    gpu: str | GPU,
    gpus: int,
    network_gbit: float = 25.0,
    gpus_per_server: int = 8,
    efficiency: float = EFFICIENCY,
) -> Plan:
    """Plans a run.

    Args:
        gpu: name of a card, see `gpus.GPUS`, or the figures of another one.
        gpus: workers; each has one.
        network_gbit: between servers, 1e9 bits per second and direction.
        gpus_per_server: cards of one server.
        efficiency: share of the card's peak that matrix products reach, 0 to 1.

    Raises:
        ValueError: an unknown card, numbers out of range, or a batch that the workers cannot share evenly.
    """
    from bsq_ray.training.run_spec import split_batch

    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if gpus < 1 or gpus_per_server < 1:
        raise ValueError(f"gpus {gpus} and gpus per server {gpus_per_server} must be 1 or more")
    if not 0 < efficiency <= 1 or network_gbit <= 0:
        raise ValueError(f"efficiency {efficiency} must be in (0, 1] and the network's {network_gbit} Gbit/s positive")
    section = run.training
    micro_batch, accumulation = split_batch(section, gpus)
    sample = needs(run)
    compute = micro_batch * accumulation * _compute_seconds(run, sample, card, efficiency)
    sent = bytes_sent(sum(sample.parameters.values()), section.engine, gpus, accumulation)
    sending = seconds_sending(sent, gpus, gpus_per_server, card.link, network_gbit)
    memory = training_memory(run, gpus, micro_batch)
    seconds = compute + sending
    return Plan(
        name=run.name,
        gpu=card,
        gpus=gpus,
        sample=sample,
        micro_batch=micro_batch,
        accumulation=accumulation,
        memory=memory,
        step_flops=sum(sample.flops.values()) * section.batch_size,
        compute_seconds=compute,
        network_seconds=sending,
        bytes_sent=sent,
        data_bytes=section.batch_size * sample.read / seconds,
        samples_per_second=section.batch_size / seconds,
        days=section.steps * seconds / 86400,
        advice=_advice(run, card, gpus, micro_batch) if memory.total > card.memory_gib * 2**30 else (),
    )


def reconstruction_rate(model: config.TokenizerModel, gpu: str, efficiency: float = EFFICIENCY) -> float:
    """Images one card encodes and decodes per second, in bf16."""
    card = find_gpu(gpu)
    products = tokenizer_forward(model) / (card.bf16_tflops * 1e12 * efficiency)
    # Without a backward pass every activation is written and read once.
    return 1 / (products + 2 * tokenizer_bytes(model, half=True) / (card.bandwidth * 1e9))


def _compute_seconds(run: config.AnyConfig, sample: Needs, card: GPU, efficiency: float) -> float:
    """Of one sample: products at a share of the peak, then memory traffic.

    Each activation is written, read by the next layer, read by the backward pass, and its gradient written. What is not
    a product is bound by memory: Ivanov et al., "Data Movement Is All You Need", 2021.
    """
    half = run.training.engine.precision != "fp32"
    peak = (card.bf16_tflops if half else card.fp32_tflops) * 1e12
    products = sum(sample.flops.values()) / (peak * efficiency)
    return products + 4 * sum(sample.activations) / (card.bandwidth * 1e9)


def _advice(run: config.AnyConfig, card: GPU, gpus: int, micro_batch: int) -> tuple[str, ...]:
    """Changes that make it fit, each by itself unless it says otherwise."""
    found = []
    whole = _largest_that_fits(run, card, gpus, micro_batch)
    if whole:
        found.append(f"training.micro_batch_size={whole} (accumulates; same global batch)")
    if isinstance(run, config.TokenizerConfig) and not run.model.gradient_checkpointing:
        model = run.model.model_copy(update={"gradient_checkpointing": True})
        less = _largest_that_fits(run.model_copy(update={"model": model}), card, gpus, micro_batch)
        smaller = f" training.micro_batch_size={less}" if less < micro_batch else ""
        if less:
            found.append(f"model.gradient_checkpointing=true{smaller} (a third more compute)")
    if not found:
        found.append("a card with more memory, or a smaller model: not even one sample at a time fits")
    return tuple(found)


def _largest_that_fits(run: config.AnyConfig, card: GPU, gpus: int, share: int) -> int:
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    fitting = (size for size in sizes if training_memory(run, gpus, size).total <= card.memory_gib * 2**30)
    return next(fitting, 0)
