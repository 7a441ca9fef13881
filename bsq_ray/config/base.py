"""Configuration shared by all stages: data order, optimizer, schedule, engine, training.

Each key has its type, range, default and description here; `docs/reference/config.md` is generated from them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StrictModel(BaseModel):
    """A frozen configuration model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_bool_for_number(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and key in cls.model_fields and cls.model_fields[key].annotation is not bool:
                raise ValueError(f"{key} cannot be true or false")
        return values


class TransformerConfig(StrictModel):
    """Sizes of a Transformer, such as the encoder or decoder of a tokenizer (paper section 3.1)."""

    width: int = Field(768, ge=8, description="Embedding dimension.")
    layers: int = Field(12, ge=1, description="Transformer blocks.")
    heads: int = Field(12, ge=1, description="Attention heads; must divide the width.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of a block's MLP, as a multiple of the width.")

    @model_validator(mode="after")
    def _check_heads_divide_width(self) -> TransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class DataOrderConfig(StrictModel):
    """Order in which samples are read, and the maximum number of skipped samples."""

    interleave: int = Field(
        16,
        ge=1,
        description="Contiguous parts of the epoch that are read in turn; should be a multiple of the worker count.",
    )
    shuffle_block_size: int = Field(512, ge=1, description="Samples shuffled together inside one of these parts.")
    prefetch_batches: int = Field(4, ge=1, description="Batches decoded ahead of the training step.")
    max_skipped_samples: int = Field(
        100, ge=0, description="Undecodable samples that are skipped and logged before the run fails."
    )


class MuonConfig(StrictModel):
    """Muon, for the matrices of transformer blocks and of convolutions (Jordan et al., 2024)."""

    base_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Learning rate at batch size 256, on the scale of AdamW's; null: base_learning_rate of AdamW.",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay rate of the momentum.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay of these matrices.")
    ns_steps: int = Field(
        5,
        ge=1,
        le=10,
        description="Newton-Schulz iterations that orthogonalize a matrix; fewer are faster, less exact.",
    )
    convolutions: bool = Field(
        False,
        description="Also optimize convolution kernels, each reshaped to a matrix; only discriminators have them.",
    )


class OptimizerConfig(StrictModel):
    """AdamW for all parameters, or Muon for the matrices of transformer blocks and AdamW for all others."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="Optimizer of the linear layers in transformer blocks; AdamW optimizes everything else."
    )
    muon: MuonConfig = Field(MuonConfig(), description="Muon, if kind is muon.")
    base_learning_rate: float = Field(
        1.024e-4, gt=0, description="Learning rate at batch size 256; scales linearly with the global batch size."
    )
    betas: tuple[float, float] = Field((0.9, 0.99), description="Decay rates of the first and second moments.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay, applied to every parameter.")
    eps: float = Field(1e-8, gt=0, description="Added to the denominator for numerical stability.")
    max_grad_norm: float = Field(0.0, ge=0, description="Maximum gradient norm; 0 disables clipping.")


class ScheduleConfig(StrictModel):
    """Learning rate schedule: linear warm-up from `warmup_start_factor` to 1, then cosine decay to `final_factor`."""

    warmup_steps: int = Field(5000, ge=0, description="Number of steps of the linear warm-up.")
    warmup_start_factor: float = Field(0.1, ge=0, le=1, description="Learning rate factor at step 0.")
    final_factor: float = Field(0.0, ge=0, le=1, description="Learning rate factor at the last step.")


class EngineConfig(StrictModel):
    """Distribution of parameters and optimizer state: DeepSpeed ZeRO, or plain data parallelism (ddp)."""

    kind: Literal["deepspeed", "ddp"] = Field("deepspeed", description="Distributed training engine.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="ZeRO stage; partitions nothing (0), optimizer state (1), + gradients (2), + parameters (3). "
        "Stage 2 frees gradients of other partitions only after all are averaged.",
    )
    offload_optimizer: bool = Field(
        False, description="Keep optimizer state in host memory: slower, saves 12 bytes of GPU memory per parameter."
    )
    precision: Literal["bf16", "fp32", "auto"] = Field(
        "bf16",
        description="bf16 autocast with fp32 weights, fp32 without TF32, or auto: bf16 if the hardware supports it.",
    )
    communication_data_type: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Data type in which workers send gradients; bf16 halves these bytes and rounds each sum.",
    )
    compile: bool = Field(False, description="Apply torch.compile to the transformer blocks.")

    @model_validator(mode="after")
    def _check_offload_needs_zero(self) -> EngineConfig:
        if self.offload_optimizer and self.kind == "ddp":
            raise ValueError("offload_optimizer needs DeepSpeed; use kind deepspeed with zero_stage 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer needs optimizer state partitioned by ZeRO, and zero_stage 0 partitions none; "
                "use zero_stage 1, 2 or 3"
            )
        return self


class TrainingConfig(StrictModel):
    """Training run: steps, batch size, optimizer, and intervals of logs, samples, evaluations and checkpoints."""

    steps: int = Field(1_000_000, ge=1, description="Number of optimizer steps.")
    batch_size: int = Field(256, ge=1, description="Global batch size: samples per optimizer step over all workers.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Samples per forward pass of a worker; null disables gradient accumulation."
    )
    seed: int = Field(0, ge=0, description="Seed for initial weights, data order and random transforms.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Optimizer.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="Learning rate schedule.")
    engine: EngineConfig = Field(EngineConfig(), description="Distribution of parameters and optimizer state.")
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="Decay of the exponential moving average (EMA) of the exported weights; 0 disables it.",
    )
    log_every: int = Field(50, ge=1, description="Steps between logged training metrics.")
    sample_every: int = Field(5000, ge=1, description="Steps between logged sample images.")
    eval_every: int = Field(20_000, ge=1, description="Steps between evaluations on held-out data.")
    eval_samples: int = Field(
        1024, ge=1, description="Samples per evaluation over all workers, or all held-out samples if there are fewer."
    )
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(3, ge=1, description="Number of most recent checkpoints to keep.")
    storage_timeout_s: float = Field(
        600.0, ge=0, description="Seconds to retry transient storage errors before the run fails."
    )
    stage_class: str | None = Field(
        None,
        description="Training stage of your own as module:Class, importable on every node; null: that of the model.",
    )
    stage_options: dict[str, bool | int | float | str] = Field(
        {}, description="Keyword arguments of stage_class, such as training.stage_options.noise=0.2."
    )
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",), description="Experiment trackers; metrics.jsonl is always written as well."
    )

    @model_validator(mode="after")
    def _check_muon_has_whole_matrices(self) -> TrainingConfig:
        if self.optimizer.kind == "muon" and self.engine.kind == "deepspeed":
            raise ValueError(
                "optimizer.kind muon needs whole matrices, and ZeRO divides them among workers; use engine.kind ddp, "
                "which needs 4 bytes per matrix element instead of AdamW's 8 and divides the work among the workers"
            )
        return self

    @model_validator(mode="after")
    def _check_stage_options_have_class(self) -> TrainingConfig:
        if self.stage_options and self.stage_class is None:
            raise ValueError("stage_options are arguments of stage_class; set stage_class too")
        return self

    @model_validator(mode="after")
    def _check_micro_batch_divides_batch(self) -> TrainingConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self
