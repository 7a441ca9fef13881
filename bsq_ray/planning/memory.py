"""Memory of one GPU during a training step, in bytes.

State: what stays from step to step. Activations: what the forward pass keeps for the backward pass, by the formulas of
`activations` and `tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.planning.requirements import sample_requirements

# CUDA's context and the libraries' workspaces (1 GiB), and memory the allocator holds but cannot use (5 %): experience.
CONTEXT_BYTES = 2**30
FRAGMENTATION_FRACTION = 0.05
# DeepSpeed's default number of elements in the buffer that gradients are reduced in (`reduce_bucket_size`).
_REDUCE_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: fp32 weights of what is trained and of networks that only measure, and the copies that products take.
        gradients: fp32.
        optimizer: AdamW's two moments and ZeRO's own fp32 copy of the weights.
        average: the moving average of the model's weights.
        buckets: buffers in which ZeRO reduces gradients.
        activations: at the fullest phase.
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
        """All of it."""
        parts = (self.weights, self.gradients, self.optimizer, self.ema, self.buckets, self.activations)
        return sum(parts) + self.overhead


def training_memory(run: config.AnyConfig, workers: int, micro_batch: int) -> Memory:
    """Peak memory of one worker that takes `micro_batch` samples at once."""
    sample, engine = sample_requirements(run), run.training.engine
    state = _state_bytes(sum(sample.parameters.values()), engine, workers)
    weights = state["weights"] + 4 * sample.frozen_parameters + sample.weight_copy_bytes
    # Only the engine whose backward pass runs has one.
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


def _state_bytes(parameters: int, engine: config.EngineConfig, workers: int) -> dict[str, float]:
    """Weights, gradients and optimizer state for P parameters on N workers (Rajbhandari et al., 2020, section 5).

    Without ZeRO 4 P + 4 P + 8 P. ZeRO adds an fp32 copy of the weights of its own, 4 P / N, also where the weights are
    fp32 already, and partitions the moments (stage 1), the gradients (2) and the weights (3). Offloaded, that copy and
    the moments are in host memory.
    """
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    size = 4.0 * parameters
    return {
        "weights": size / workers if stage == 3 else size,
        "gradients": size / workers if stage >= 2 else size,
        "optimizer": 0.0 if engine.offload_optimizer else 3 * size / workers if stage else 2 * size,
    }
