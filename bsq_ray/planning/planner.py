"""Estimate memory, duration, network traffic and data rate of a run before it is launched."""

from __future__ import annotations

from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.planning.activations import tokenizer_activation_bytes
from bsq_ray.planning.communication import communication_bytes, communication_time_s, muon_communication_bytes
from bsq_ray.planning.flops import tokenizer_forward_flops
from bsq_ray.planning.gpus import GPUSpec, find_gpu
from bsq_ray.planning.memory import Memory, num_muon_elements, training_memory
from bsq_ray.planning.requirements import SampleRequirements, sample_requirements

# Fraction of the peak at which matrix products run. It follows from the only published measurement of this network:
# 45.1 reconstructed images/s at 256 px on an A5000.
DEFAULT_EFFICIENCY = 0.19


@dataclass(frozen=True)
class Plan:
    """Requirements of a run; sizes in bytes, times in seconds.

    Attributes:
        name: name of the configuration.
        gpu, num_gpus: type and number of GPUs.
        sample: requirements of one image, clip or row of tokens.
        micro_batch_size: samples per micro batch of one GPU.
        accumulation_steps: micro batches per training step.
        memory: memory of one GPU.
        step_flops: operations per step of all GPUs.
        compute_s, communication_s: seconds per step, without overlap.
        communication_bytes: bytes that each GPU sends per step.
        network_bound_gpus: smallest number of GPUs on which the same global batch takes longer to communicate than to
            compute; None if there is none up to one sample per GPU.
        data_bytes_per_second: bytes that all GPUs read per second.
        samples_per_second: throughput of all GPUs.
        days: duration of the run.
        advice: configuration overrides that make the run fit into memory; empty if it fits.
    """

    name: str
    gpu: GPUSpec
    num_gpus: int
    sample: SampleRequirements
    micro_batch_size: int
    accumulation_steps: int
    memory: Memory
    step_flops: float
    compute_s: float
    communication_s: float
    communication_bytes: float
    network_bound_gpus: int | None
    data_bytes_per_second: float
    samples_per_second: float
    days: float
    advice: tuple[str, ...]

    @property
    def step_s(self) -> float:
        """Duration of a step in seconds: computation, then communication."""
        return self.compute_s + self.communication_s

    @property
    def has_enough_memory(self) -> bool:
        """True if the run fits into the memory of the GPU."""
        return self.memory.total <= self.gpu.memory_gib * 2**30


def make_plan(
    run: config.AnyConfig,
    gpu: str | GPUSpec,
    num_gpus: int,
    *,
    network_gbit: float = 25.0,
    gpus_per_node: int = 8,
    efficiency: float = DEFAULT_EFFICIENCY,
) -> Plan:
    """Estimate the requirements of a run.

    Args:
        run: configuration of the run.
        gpu: key of `gpus.GPUS`, or the properties of another GPU.
        num_gpus: number of GPUs, one worker each.
        network_gbit: bandwidth between nodes per direction, 1e9 bits per second.
        gpus_per_node: number of GPUs per node.
        efficiency: fraction of the GPU's peak that matrix products reach, 0 to 1.

    Raises:
        ValueError: the GPU is unknown, a number is out of range, or the batch cannot be divided among the workers.
    """
    from bsq_ray.config.batch_split import can_split_batch, split_batch

    gpu_spec = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if num_gpus < 1 or gpus_per_node < 1:
        raise ValueError(f"number of GPUs {num_gpus} and GPUs per node {gpus_per_node} must be 1 or more")
    if not 0 < efficiency <= 1 or network_gbit <= 0:
        raise ValueError(
            f"efficiency {efficiency} must be in (0, 1], and network bandwidth {network_gbit} Gbit/s must be positive"
        )
    training_config = run.training
    micro_batch, accumulation = split_batch(run, num_gpus)
    sample = sample_requirements(run)
    extra_flops = _statistics_flops(run) if accumulation > 1 else 0.0
    compute_per_sample = _compute_time_s(run, sample, gpu_spec, efficiency)
    compute_per_sample += extra_flops / (_peak_flops(run, gpu_spec) * efficiency)
    compute = micro_batch * accumulation * compute_per_sample
    sent_bytes = _sent_bytes(run, sample, num_gpus)

    def communication_s(workers: int) -> float:
        num_bytes = _sent_bytes(run, sample, workers)
        return communication_time_s(num_bytes, workers, gpus_per_node, gpu_spec.link_gb_per_s, network_gbit)

    communication = communication_s(num_gpus)
    memory = training_memory(run, num_gpus, micro_batch)
    seconds = compute + communication
    return Plan(
        name=run.name,
        gpu=gpu_spec,
        num_gpus=num_gpus,
        sample=sample,
        micro_batch_size=micro_batch,
        accumulation_steps=accumulation,
        memory=memory,
        step_flops=(sum(sample.flops.values()) + extra_flops) * training_config.batch_size,
        compute_s=compute,
        communication_s=communication,
        communication_bytes=sent_bytes,
        network_bound_gpus=next(
            (
                workers
                for workers in range(2, training_config.batch_size + 1)
                if can_split_batch(run, workers)
                and communication_s(workers) > training_config.batch_size / workers * compute_per_sample
            ),
            None,
        ),
        data_bytes_per_second=training_config.batch_size * sample.bytes_read / seconds,
        samples_per_second=training_config.batch_size / seconds,
        days=training_config.steps * seconds / 86400,
        advice=_advice(run, gpu_spec, num_gpus, micro_batch) if memory.total > gpu_spec.memory_gib * 2**30 else (),
    )


def reconstruction_rate(model: config.TokenizerModelConfig, gpu: str, efficiency: float = DEFAULT_EFFICIENCY) -> float:
    """Return the number of images per second that one GPU encodes and decodes in bf16."""
    gpu_spec = find_gpu(gpu)
    products = tokenizer_forward_flops(model) / (gpu_spec.bf16_tflops * 1e12 * efficiency)
    # Without a backward pass every activation is written and read once.
    return 1 / (products + 2 * tokenizer_activation_bytes(model, half=True) / (gpu_spec.memory_gb_per_s * 1e9))


def _sent_bytes(run: config.AnyConfig, sample: SampleRequirements, workers: int) -> float:
    """Return the bytes that each worker sends per step; `workers` divides the global batch."""
    engine, per_worker = run.training.engine, run.training.batch_size // workers
    accumulation = max(1, per_worker // (run.training.micro_batch_size or per_worker))
    sent_bytes = communication_bytes(sum(sample.parameters.values()), engine, workers, accumulation)
    half = engine.precision != "fp32"
    return sent_bytes + muon_communication_bytes(num_muon_elements(run), workers, half)


def _compute_time_s(run: config.AnyConfig, sample: SampleRequirements, gpu_spec: GPUSpec, efficiency: float) -> float:
    """Return the seconds for one sample: matrix products at a fraction of the peak, then memory traffic.

    Each activation is written, read by the next layer, read by the backward pass, and its gradient is written. All
    other operations are bound by memory bandwidth: Ivanov et al., "Data Movement Is All You Need", 2021.
    """
    products = sum(sample.flops.values()) / (_peak_flops(run, gpu_spec) * efficiency)
    return products + 4 * sum(sample.activations) / (gpu_spec.memory_gb_per_s * 1e9)


def _peak_flops(run: config.AnyConfig, gpu_spec: GPUSpec) -> float:
    half = run.training.engine.precision != "fp32"
    return (gpu_spec.bf16_tflops if half else gpu_spec.fp32_tflops) * 1e12


def _statistics_flops(run: config.AnyConfig) -> float:
    """Return the operations per sample of the encoder pass that collects statistics before gradient accumulation."""
    if not isinstance(run, config.TokenizerConfig) or run.training.only == "decoder":
        return 0.0
    is_binary = isinstance(run.model.quantizer, config.BSQConfig | config.LFQConfig)
    return tokenizer_forward_flops(run.model) / 2 if is_binary else 0.0


def _advice(run: config.AnyConfig, gpu_spec: GPUSpec, num_gpus: int, micro_batch: int) -> tuple[str, ...]:
    """Return alternative overrides that make the run fit into memory, each with its cost."""
    advice = []
    fitting_batch = _largest_fitting_micro_batch(run, gpu_spec, num_gpus, micro_batch)
    if fitting_batch:
        advice.append(f"training.micro_batch_size={fitting_batch} (accumulates; same global batch)")
    if isinstance(run, config.TokenizerConfig) and not run.model.gradient_checkpointing:
        model = run.model.model_copy(update={"gradient_checkpointing": True})
        checkpointed_batch = _largest_fitting_micro_batch(
            run.model_copy(update={"model": model}), gpu_spec, num_gpus, micro_batch
        )
        smaller = f" training.micro_batch_size={checkpointed_batch}" if checkpointed_batch < micro_batch else ""
        if checkpointed_batch:
            advice.append(f"model.gradient_checkpointing=true{smaller} (a third more compute)")
    if not advice:
        fits_one = training_memory(run, num_gpus, 1).total <= gpu_spec.memory_gib * 2**30
        smallest = (
            "the smallest micro batch with the discriminator's groups" if fits_one else "a micro batch of one sample"
        )
        advice.append(f"use a GPU with more memory or a smaller model: {smallest} does not fit")
    return tuple(advice)


def _largest_fitting_micro_batch(run: config.AnyConfig, gpu_spec: GPUSpec, num_gpus: int, micro_batch: int) -> int:
    """Return the largest micro batch that fits and leads to the same training steps as the whole batch, or 0."""
    from bsq_ray.config.batch_split import can_split_batch

    def takes_same_steps(size: int) -> bool:
        training_config = run.training.model_copy(update={"micro_batch_size": size})
        return can_split_batch(run.model_copy(update={"training": training_config}), num_gpus)

    sizes = [size for size in range(micro_batch, 0, -1) if micro_batch % size == 0 and takes_same_steps(size)]
    fitting = (size for size in sizes if training_memory(run, num_gpus, size).total <= gpu_spec.memory_gib * 2**30)
    return next(fitting, 0)
