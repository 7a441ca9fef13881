"""Memory of one GPU during a training step, in bytes.

State persists from step to step. Activations are saved by the forward pass for the backward pass; their formulas are in
`activations` and `token_costs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.planning.layer_costs import num_block_matrix_elements, num_kernel_elements
from bsq_ray.planning.requirements import sample_requirements

# Empirical: CUDA context and workspaces of libraries (1 GiB), and fragmented memory of the allocator (5 %).
CONTEXT_BYTES = 2**30
FRAGMENTATION_FRACTION = 0.05
# Elements of a bucket of plain data parallelism, see `training.engines.backward_buckets`.
_BUCKET_ELEMENTS = 25_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: fp32 weights of trained and frozen networks, and their copies for matrix products.
        gradients: fp32 gradients.
        optimizer: AdamW's two moments or Muon's momentum, and ZeRO's fp32 copy of the weights.
        ema: moving average of the model's weights.
        buckets: buffers from which workers send gradients.
        activations: activations of the phase with the most.
        overhead: context and fragmentation.
    """

    weights: float
    gradients: float
    optimizer: float
    ema: float
    buckets: float
    activations: float
    overhead: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        parts = (self.weights, self.gradients, self.optimizer, self.ema, self.buckets, self.activations)
        return sum(parts) + self.overhead


def training_memory(run: config.AnyConfig, workers: int, micro_batch: int) -> Memory:
    """Return the peak memory of one worker with micro batches of `micro_batch` samples."""
    sample, engine = sample_requirements(run), run.training.engine
    accumulates = run.training.batch_size > workers * micro_batch
    state = _state_bytes(sum(sample.parameters.values()), engine, workers, accumulates)
    # Muon has one moment per element of its matrices; it is not combined with ZeRO.
    state["optimizer"] -= 4.0 * num_muon_elements(run)
    weights = state["weights"] + 4 * sample.frozen_parameters + sample.copied_bytes
    # Only one engine at a time has buckets.
    buckets = _bucket_bytes(max(sample.parameters.values()), engine, workers)
    ema = 4.0 * next(iter(sample.parameters.values())) if run.training.ema_decay else 0.0
    activations = micro_batch * max(sample.activations)
    used = weights + state["gradients"] + state["optimizer"] + ema + buckets + activations
    return Memory(
        weights,
        state["gradients"],
        state["optimizer"],
        ema,
        buckets,
        activations,
        CONTEXT_BYTES + FRAGMENTATION_FRACTION * used,
    )


def num_muon_elements(run: config.AnyConfig) -> int:
    """Return the number of weights that Muon optimizes."""
    if run.training.optimizer.kind != "muon":
        return 0
    if isinstance(run, config.TokenizerConfig):
        kernels = 0
        if run.training.optimizer.muon.convolutions:
            kernels = num_kernel_elements(run.loss.adversarial, run.model.image_size, run.model.frames)
        encoder = 0 if run.training.only == "decoder" else num_block_matrix_elements(run.model.encoder)
        return encoder + num_block_matrix_elements(run.model.decoder) + kernels
    return num_block_matrix_elements(run.model.transformer)


def _bucket_bytes(parameters: int, engine: config.EngineConfig, workers: int) -> float:
    """Return the memory of the copies of gradients that one engine of P parameters sends, bytes.

    A bucket replaces the gradients that it was copied from. Data parallelism needs the copy of one bucket. ZeRO-1 and
    ZeRO-2 keep all buckets until their averages are in DeepSpeed's buffer, which has the size of the gradients. It is
    allocated after the backward pass but counted together with the activations, so their plan is an upper bound.
    """
    if engine.kind == "ddp":
        return 4.0 * min(parameters, _BUCKET_ELEMENTS) if workers > 1 else 0.0
    if engine.zero_stage not in (1, 2):
        return 0.0
    sent_bytes = 2.0 if engine.communication_data_type == "bf16" else 4.0
    copies = sent_bytes * parameters if workers > 1 else 0.0
    return 4.0 * parameters + copies


def _state_bytes(parameters: int, engine: config.EngineConfig, workers: int, accumulates: bool) -> dict[str, float]:
    """Return weights, gradients and optimizer state of P parameters on N workers, bytes.

    Rajbhandari et al., 2020, section 5. Without ZeRO: 4 P + 4 P + 8 P. ZeRO adds its own fp32 copy of the weights,
    4 P / N, even for fp32 weights. It partitions the moments (stage 1), the gradients (stage 2) and the weights (stage
    3). Stage 2 has all gradients while it accumulates them. With offloading, the copy and the moments are in host
    memory.
    """
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    size = 4.0 * parameters
    return {
        "weights": size / workers if stage == 3 else size,
        "gradients": size / workers if stage == 3 or (stage == 2 and not accumulates) else size,
        "optimizer": 0.0 if engine.offload_optimizer else 3 * size / workers if stage else 2 * size,
    }
