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
# DeepSpeed's default number of elements of the gradient buffer (`reduce_bucket_size`).
_REDUCE_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: fp32 weights of trained and frozen networks, and their copies for matrix products.
        gradients: fp32 gradients.
        optimizer: AdamW's two moments or Muon's momentum, and ZeRO's fp32 copy of the weights.
        ema: moving average of the model's weights.
        buckets: buffers in which ZeRO reduces gradients.
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
    state = _state_bytes(sum(sample.parameters.values()), engine, workers)
    # Muon has one moment per element of its matrices; it is not combined with ZeRO.
    state["optimizer"] -= 4.0 * num_muon_elements(run)
    weights = state["weights"] + 4 * sample.frozen_parameters + sample.weight_copy_bytes
    # Only the engine whose backward pass is running has a buffer.
    buckets = 4.0 * _REDUCE_BUCKET_ELEMENTS if engine.kind == "deepspeed" and engine.zero_stage in (1, 2) else 0.0
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
        return num_block_matrix_elements(run.model.encoder) + num_block_matrix_elements(run.model.decoder) + kernels
    return num_block_matrix_elements(run.model.transformer)


def _state_bytes(parameters: int, engine: config.EngineConfig, workers: int) -> dict[str, float]:
    """Return weights, gradients and optimizer state of P parameters on N workers, bytes.

    Rajbhandari et al., 2020, section 5. Without ZeRO: 4 P + 4 P + 8 P. ZeRO adds its own fp32 copy of the weights,
    4 P / N, even for fp32 weights. It partitions the moments (stage 1), the gradients (stage 2) and the weights (stage
    3). With offloading, the copy and the moments are in host memory.
    """
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    size = 4.0 * parameters
    return {
        "weights": size / workers if stage == 3 else size,
        "gradients": size / workers if stage >= 2 else size,
        "optimizer": 0.0 if engine.offload_optimizer else 3 * size / workers if stage else 2 * size,
    }
