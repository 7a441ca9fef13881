"""Configuration of the token models: the masked language model and the autoregressive prior.

Each key has its type, range, default and description here; `docs/reference/config.md` is generated from them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bsq_ray.config.base import (
    DataOrderConfig,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    StrictModel,
    TrainingConfig,
    TransformerConfig,
)


class TokenModelConfig(StrictModel):
    """Shape of the tokens and sizes of the Transformer, for every token model."""

    tokenizer: str | None = Field(
        None, description="Model id of the tokenizer; null: the tokenizer of the training token table."
    )
    tokens_id: str | None = Field(
        None, description="Id of its tokens, which all decoders of these tokens share; null: that of the token table."
    )
    grid: tuple[int, int, int] = Field(
        (1, 16, 16), description="Frames, rows and columns of tokens; must match the token table."
    )
    bits: int = Field(18, ge=1, le=128, description="Bits per token; must match the tokenizer.")
    sub_bits: int = Field(9, ge=1, le=14, description="Bits per sub-token, the unit of prediction; must divide bits.")
    width: int = Field(768, ge=8, description="Embedding dimension.")
    layers: int = Field(24, ge=1, description="Transformer blocks.")
    heads: int = Field(8, ge=1, description="Attention heads; must divide the width.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of a block's MLP, as a multiple of the width.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout after attention and after MLP, in training.")

    def accepts_tokens(self, tokenizer_id: str | None, tokens_id: str | None) -> bool:
        """Return True if the model can read tokens of a tokenizer: ids of the tokens count, or of models without them.

        Args:
            tokenizer_id: model id of the tokenizer.
            tokens_id: id of its tokens; None if unknown.
        """
        if self.tokens_id is not None and tokens_id is not None:
            return self.tokens_id == tokens_id
        return self.tokenizer in (None, tokenizer_id)

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
        """Number of tokens per image or clip (N)."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def num_sub_tokens(self) -> int:
        """Number of sub-tokens per token (S)."""
        return self.bits // self.sub_bits

    @property
    def transformer(self) -> TransformerConfig:
        """Sizes of the Transformer."""
        return TransformerConfig(width=self.width, layers=self.layers, heads=self.heads, mlp_ratio=self.mlp_ratio)


class MaskedLMModelConfig(TokenModelConfig):
    """Bidirectional Transformer that predicts masked tokens (paper section 4.1; MaskGIT, Chang et al., CVPR 2022)."""

    num_classes: int = Field(1000, ge=1, description="Number of classes; must match the token table.")
    mask_unit: Literal["token", "sub_token"] = Field("token", description="Unit of masking.")


class MaskedLMLossConfig(StrictModel):
    """Cross entropy at masked positions."""

    label_smoothing: float = Field(0.1, ge=0, lt=1, description="Label smoothing of the cross entropy.")
    class_dropout: float = Field(
        0.2, ge=0, le=1, description="Probability of dropping the class label; needed by classifier-free guidance."
    )


class SamplingConfig(StrictModel):
    """Image sampling from a masked language model."""

    steps: int = Field(12, ge=1, description="Forward passes per image.")
    temperature: float = Field(
        15.0, ge=0, description="Temperature of the noise added to confidences; decreases to 0 over the steps."
    )
    guidance_scale: float = Field(
        0.5, ge=0, description="Classifier-free guidance: conditional + guidance_scale * (conditional - unconditional)."
    )
    guidance_schedule: Literal["constant", "linear"] = Field(
        "constant", description="Guidance over the steps: constant, or linear from 0 to guidance_scale."
    )


_TOKEN_OPTIMIZER = OptimizerConfig(betas=(0.9, 0.96), weight_decay=0.045, max_grad_norm=1.0)
_TOKEN_ORDER = DataOrderConfig(interleave=16, shuffle_block_size=4096)


class MaskedLMConfig(StrictModel):
    """Configuration of a training run of a masked language model."""

    stage: Literal["masked-lm"] = Field("masked-lm", description="Kind of model to train.")
    name: str = Field(min_length=1, description="Name of the run and of the model folder.")
    description: str = Field("", description="First line of the model card.")
    model: MaskedLMModelConfig = Field(MaskedLMModelConfig(), description="Model architecture.")
    loss: MaskedLMLossConfig = Field(MaskedLMLossConfig(), description="Cross entropy at masked positions.")
    sampling: SamplingConfig = Field(
        SamplingConfig(), description="Sampling during training; also the defaults at inference."
    )
    data: DataOrderConfig = Field(_TOKEN_ORDER, description="Order of the token table's rows.")
    training: TrainingConfig = Field(
        TrainingConfig(
            batch_size=1024,
            optimizer=_TOKEN_OPTIMIZER,
            schedule=ScheduleConfig(warmup_steps=10_000, warmup_start_factor=0.0),
            engine=EngineConfig(),
            ema_decay=0.9999,
        ),
        description="Training run.",
    )


class PriorModelConfig(TokenModelConfig):
    """Causal Transformer that predicts the bits of each token autoregressively (paper section 4.2)."""

    order: Literal["token", "plane"] = Field(
        "token",
        description="token: all sub-tokens of a token before the next token; plane: sub-token s of all tokens before "
        "sub-token s + 1 of any, for tokenizers with nested bits. The sequence of plane is as many times longer as a "
        "token has sub-tokens.",
    )

    @property
    def sequence_length(self) -> int:
        """Positions of the Transformer: tokens, or sub-tokens in the order plane."""
        return self.num_tokens * (self.num_sub_tokens if self.order == "plane" else 1)


class PriorConfig(StrictModel):
    """Configuration of a training run of a prior."""

    stage: Literal["prior"] = Field("prior", description="Kind of model to train.")
    name: str = Field(min_length=1, description="Name of the run and of the model folder.")
    description: str = Field("", description="First line of the model card.")
    model: PriorModelConfig = Field(PriorModelConfig(dropout=0.0), description="Model architecture.")
    data: DataOrderConfig = Field(_TOKEN_ORDER, description="Order of the token table's rows.")
    training: TrainingConfig = Field(
        TrainingConfig(
            batch_size=64,
            optimizer=_TOKEN_OPTIMIZER,
            schedule=ScheduleConfig(warmup_steps=5000, warmup_start_factor=0.0),
            ema_decay=0.9999,
        ),
        description="Training run.",
    )
