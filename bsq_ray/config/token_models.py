"""The schema of what is trained on tokens: the masked language model and the autoregressive prior.

What each key means is said beside it in `presets/imagenet128-masked-lm.yaml` and `presets/imagenet128-prior.yaml`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bsq_ray.config.tokenizer_config import (
    DataOrderConfig,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    StrictModel,
    TrainingConfig,
    TransformerConfig,
)


class TokenModelConfig(StrictModel):
    """What any model of tokens must know of them, and its Transformer's sizes."""

    tokenizer: str | None = None
    grid: tuple[int, int, int] = (1, 16, 16)
    bits: int = Field(18, ge=1, le=128)
    sub_bits: int = Field(9, ge=1, le=14)
    width: int = Field(768, ge=8)
    layers: int = Field(24, ge=1)
    heads: int = Field(8, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_sizes(self) -> TokenModelConfig:
        if self.bits % self.sub_bits:
            raise ValueError(f"bits {self.bits} is not a multiple of sub_bits {self.sub_bits}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if min(self.grid) < 1:
            raise ValueError(f"grid {list(self.grid)} must be frames, rows and columns of tokens, each 1 or more")
        return self

    @property
    def num_tokens(self) -> int:
        """Tokens of an image or clip (N)."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def num_sub_tokens(self) -> int:
        """Sub-tokens of a token (S)."""
        return self.bits // self.sub_bits

    @property
    def transformer(self) -> TransformerConfig:
        """The sizes alone."""
        return TransformerConfig(width=self.width, layers=self.layers, heads=self.heads, mlp_ratio=self.mlp_ratio)


class MaskedLMModelConfig(TokenModelConfig):
    """Bidirectional Transformer that fills in masked tokens (paper section 4.1; MaskGIT, Chang et al., CVPR 2022)."""

    num_classes: int = Field(1000, ge=1)
    mask_unit: Literal["token", "sub_token"] = "token"


class MaskedLMLossConfig(StrictModel):
    """Cross entropy at masked places."""

    label_smoothing: float = Field(0.1, ge=0, lt=1)
    class_dropout: float = Field(0.2, ge=0, le=1)


class SamplingConfig(StrictModel):
    """How images are drawn from a masked language model."""

    steps: int = Field(12, ge=1)
    temperature: float = Field(15.0, ge=0)
    guidance_scale: float = Field(0.5, ge=0)
    guidance_schedule: Literal["constant", "ramped"] = "constant"


_TOKEN_OPTIMIZER = OptimizerConfig(betas=(0.9, 0.96), weight_decay=0.045, max_grad_norm=1.0)


class MaskedLMConfig(StrictModel):
    """Everything that decides a masked language model's training run."""

    stage: Literal["masked-lm"] = "masked-lm"
    name: str = Field(min_length=1)
    description: str = ""
    model: MaskedLMModelConfig = MaskedLMModelConfig()
    loss: MaskedLMLossConfig = MaskedLMLossConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DataOrderConfig = DataOrderConfig(interleave=16, shuffle_block_size=4096)
    training: TrainingConfig = TrainingConfig(
        batch_size=1024,
        optimizer=_TOKEN_OPTIMIZER,
        schedule=ScheduleConfig(warmup_steps=10_000, warmup_start_factor=0.0),
        engine=EngineConfig(),
        ema_decay=0.9999,
    )


class PriorModelConfig(TokenModelConfig):
    """Causal Transformer over tokens that predicts a token's bits one after the other (paper section 4.2)."""


class PriorConfig(StrictModel):
    """Everything that decides a prior's training run."""

    stage: Literal["prior"] = "prior"
    name: str = Field(min_length=1)
    description: str = ""
    model: PriorModelConfig = PriorModelConfig(dropout=0.0)
    data: DataOrderConfig = DataOrderConfig(interleave=16, shuffle_block_size=4096)
    training: TrainingConfig = TrainingConfig(
        batch_size=64,
        optimizer=_TOKEN_OPTIMIZER,
        schedule=ScheduleConfig(warmup_steps=5000, warmup_start_factor=0.0),
        ema_decay=0.9999,
    )
