"""The schema of the configuration: every key, its type, range and default.

What each key means is said beside it in `presets/imagenet128-bsq18.yaml`, which writes out all of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class StrictModel(BaseModel):
    """A section of the configuration: unknown keys are refused and values cannot be changed after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_bool_for_number(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and key in cls.model_fields and cls.model_fields[key].annotation is not bool:
                raise ValueError(f"{key} cannot be true or false")
        return values


class TransformerConfig(StrictModel):
    """One ViT: the encoder or the decoder of a tokenizer (paper section 3.1)."""

    width: int = Field(768, ge=8)
    layers: int = Field(12, ge=1)
    heads: int = Field(12, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _check_heads_divide_width(self) -> TransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class DecoderConfig(TransformerConfig):
    """The decoder adds a head of two linear layers with a Tanh between them."""

    head_hidden_dim: int = Field(3072, ge=1)


class EntropyConfig(StrictModel):
    """The entropy penalty of BSQ and LFQ (paper equation 4).

    penalty = weight · (per_sample_weight · E[H] - dataset_weight · H(E)) / inverse_temperature
    """

    estimate: Literal["analytical", "group"] = "analytical"
    group_size: int = Field(1, ge=1, le=18)
    inverse_temperature: float = Field(1.0, gt=0)
    per_sample_weight: float = Field(1.0, ge=0)
    codebook_weight: float = Field(1.0, ge=0)
    weight: float = Field(1.0, ge=0)
    across_workers: bool = False


class _BinaryQuantizerConfig(StrictModel):
    bits: int = Field(18, ge=1, le=128)
    entropy: EntropyConfig = EntropyConfig()
    commitment_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check_group_size_divides_bits(self) -> _BinaryQuantizerConfig:
        if self.entropy.estimate == "group" and self.bits % self.entropy.group_size:
            raise ValueError(f"bits {self.bits} is not a multiple of entropy.group_size {self.entropy.group_size}")
        return self


class BSQConfig(_BinaryQuantizerConfig):
    """The vector is projected on the unit sphere, then each coordinate keeps its sign."""

    kind: Literal["bsq"] = "bsq"


class LFQConfig(_BinaryQuantizerConfig):
    """Look-up free quantisation: BSQ without the projection on the sphere."""

    kind: Literal["lfq"] = "lfq"


class FSQConfig(StrictModel):
    """Finite scalar quantisation: each channel is rounded to its number of levels."""

    kind: Literal["fsq"]
    levels: tuple[Annotated[int, Field(ge=2, le=256)], ...] = Field((8, 8, 8, 8, 8, 8), min_length=1)

    @property
    def bits(self) -> int:
        """Bits of one token: each channel is written in the fewest bits that hold its levels."""
        return sum((n - 1).bit_length() for n in self.levels)


class VQConfig(StrictModel):
    """Vector quantisation with a learned codebook."""

    kind: Literal["vq"]
    codebook_size: int = Field(16384, ge=2)
    code_dim: int = Field(8, ge=1)
    l2_normalize: bool = True
    commitment_weight: float = Field(0.25, ge=0)

    @model_validator(mode="after")
    def _check_power_of_two(self) -> VQConfig:
        if self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"codebook_size {self.codebook_size} is not a power of two, so it has no whole bits")
        return self

    @property
    def bits(self) -> int:
        """Bits of one token."""
        return self.codebook_size.bit_length() - 1


QuantizerConfig = Annotated[BSQConfig | LFQConfig | FSQConfig | VQConfig, Field(discriminator="kind")]


class TokenizerModelConfig(StrictModel):
    """The BSQ-ViT tokenizer: patches → encoder → quantiser → decoder → patches."""

    image_size: int = Field(128, ge=8)
    patch_size: int = Field(8, ge=1)
    frames: int = Field(1, ge=1)
    causal: bool = True
    encoder: TransformerConfig = TransformerConfig()
    decoder: DecoderConfig = DecoderConfig()
    quantizer: QuantizerConfig = BSQConfig()
    gradient_checkpointing: bool = False

    @field_validator("quantizer", mode="before")
    @classmethod
    def _default_kind_bsq(cls, value: Any) -> Any:
        return {"kind": "bsq", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_patch_size_divides_image_size(self) -> TokenizerModelConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self


class AdversarialConfig(StrictModel):
    """The discriminator and its losses (paper section 3; StyleGAN2's R1 penalty every `r1_every` steps)."""

    weight: float = Field(0.1, ge=0)
    adaptive_weight: bool = False
    start_step: int = Field(0, ge=0)
    objective: Literal["non_saturating", "hinge"] = "non_saturating"
    discriminator: Literal["stylegan2", "patchgan", "stylegan2-3d"] = "stylegan2"
    channel_base: int = Field(32768, ge=64)
    channel_max: int = Field(512, ge=8)
    r1_gamma: float = Field(10.0, ge=0)
    r1_every: int = Field(16, ge=1)


class TokenizerLossConfig(StrictModel):
    """Reconstruction + perceptual + adversarial + quantiser losses of the tokenizer (paper equation 2)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    reconstruction_weight: float = Field(1.0, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    perceptual_network: Literal["vgg", "alex"] = "vgg"
    adversarial: AdversarialConfig = AdversarialConfig()
    quantizer_weight: float = Field(0.1, ge=0)
    quantizer_weight_start_factor: float = Field(3.0, ge=0)
    quantizer_weight_ramp_steps: int = Field(2000, ge=0)


class DataOrderConfig(StrictModel):
    """The order in which samples are read, and how many may be damaged."""

    interleave: int = Field(16, ge=1)
    shuffle_block_size: int = Field(512, ge=1)
    prefetch_batches: int = Field(4, ge=1)
    max_skipped_samples: int = Field(100, ge=0)


class DataConfig(DataOrderConfig):
    """What is read from the shards, in which order, and how it becomes training images and clips."""

    resize_range: tuple[float, float] = (1.0, 1.0)
    random_flip: bool = False
    eval_interpolation: Literal["lanczos", "bilinear"] = "lanczos"
    frame_stride: int = Field(1, ge=1)
    clips_per_video: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _check_resize_range(self) -> DataConfig:
        low, high = self.resize_range
        if not 1.0 <= low <= high:
            raise ValueError(f"crop_scale {list(self.resize_range)} is not a range [low, high] with 1 <= low <= high")
        return self


class OptimizerConfig(StrictModel):
    """AdamW of every optimised module; the learning rate is per 256 images and scales with the global batch."""

    base_learning_rate: float = Field(1.024e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(1e-4, ge=0)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(0.0, ge=0)


class ScheduleConfig(StrictModel):
    """Linear warm-up from `warmup_from` to 1, then a half cosine down to `final`, as factors of the learning rate."""

    warmup_steps: int = Field(5000, ge=0)
    warmup_start_factor: float = Field(0.1, ge=0, le=1)
    final_factor: float = Field(0.0, ge=0, le=1)


class EngineConfig(StrictModel):
    """Who holds parameters and optimizer state: DeepSpeed ZeRO, or plain data parallelism (ddp)."""

    kind: Literal["deepspeed", "ddp"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    precision: Literal["bf16", "fp32", "auto"] = "bf16"
    compile: bool = False

    @model_validator(mode="after")
    def _check_offload_needs_zero(self) -> EngineConfig:
        if self.offload_optimizer and self.kind == "ddp":
            raise ValueError("offload_optimizer is done by DeepSpeed; use kind deepspeed with zero_stage 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer moves the optimizer state that ZeRO partitions, and zero_stage 0 partitions none; "
                "use zero_stage 1, 2 or 3"
            )
        return self


class TrainingConfig(StrictModel):
    """The run: how long, how large a batch, what is saved and shown along the way."""

    steps: int = Field(1_000_000, ge=1)
    batch_size: int = Field(256, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    ema_decay: float = Field(0.999, ge=0, lt=1)
    log_every: int = Field(50, ge=1)
    sample_every: int = Field(5000, ge=1)
    eval_every: int = Field(20_000, ge=1)
    eval_batches: int = Field(2, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    storage_timeout_s: float = Field(600.0, ge=0)

    @model_validator(mode="after")
    def _check_micro_batch_divides_batch(self) -> TrainingConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class TokenizerConfig(StrictModel):
    """Everything that decides a tokenizer's training run."""

    stage: Literal["tokenizer"] = "tokenizer"
    name: str = Field(min_length=1)
    description: str = ""
    model: TokenizerModelConfig = TokenizerModelConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _check_3d_discriminator_has_frames(self) -> TokenizerConfig:
        if self.loss.adversarial.discriminator == "stylegan2-3d" and self.model.frames == 1:
            raise ValueError(
                "loss.adversarial.discriminator stylegan2-3d judges clips; it needs model.frames above 1, or choose "
                "stylegan2 or patchgan, which judge clips frame by frame"
            )
        return self

    @model_validator(mode="after")
    def _check_zero3_gan_accumulation(self) -> TokenizerConfig:
        training = self.training
        uses_zero3 = training.engine.kind == "deepspeed" and training.engine.zero_stage == 3
        if uses_zero3 and training.micro_batch_size is not None and self.loss.adversarial.weight:
            raise ValueError(
                "training.engine.zero_stage 3 with training.micro_batch_size accumulates wrong gradients when there is "
                "a discriminator, because its graph runs outside the engine; use zero_stage 2 or leave "
                "micro_batch_size out"
            )
        return self
