"""Configuration of a training run of a tokenizer: network, losses, data.

Each key has its type, range, default and description here; `docs/reference/config.md` is generated from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bsq_ray.config.adversarial_config import AdversarialConfig
from bsq_ray.config.base import StrictModel, TrainingConfig, TransformerConfig
from bsq_ray.config.data_config import DataConfig
from bsq_ray.config.image_sizes import check_crop_sizes, check_discriminator_sizes


class DecoderConfig(TransformerConfig):
    """The decoder's Transformer and its head of two linear layers with a Tanh between them."""

    head_hidden_dim: int = Field(3072, ge=1, description="Hidden width of the Linear-Tanh-Linear head.")


class EntropyConfig(StrictModel):
    """The entropy penalty of BSQ and LFQ (paper equation 4).

    penalty = weight · (per_sample_weight · E[H] - codebook_weight · H(E)) / inverse_temperature
    """

    estimate: Literal["analytical", "group"] = Field(
        "analytical", description="analytical: each bit independently, O(L); group: jointly over groups of bits."
    )
    group_size: int = Field(
        1, ge=1, le=18, description="Bits of a group with estimate group; cost grows as 2^group_size."
    )
    inverse_temperature: float = Field(1.0, gt=0, description="Sharpness of the soft quantization.")
    per_sample_weight: float = Field(
        1.0, ge=0, description="Weight of the entropy of each token, which makes its bits confident."
    )
    codebook_weight: float = Field(
        1.0, ge=0, description="Weight of the entropy over the batch, which keeps all codes in use (the paper's gamma)."
    )
    weight: float = Field(1.0, ge=0, description="Weight of the whole penalty, before loss.quantizer_weight.")
    across_workers: bool = Field(
        True,
        description="Take the entropy over the global batch, for any number of workers; false: over each worker's own "
        "part, as in the published code.",
    )


class _BinaryQuantizerConfig(StrictModel):
    bits: int = Field(18, ge=1, le=128, description="Bits of a token (L).")
    entropy: EntropyConfig = Field(EntropyConfig(), description="The entropy penalty.")
    commitment_weight: float = Field(0.0, ge=0, description="Weight of the pull towards the chosen code.")
    keep: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="Nested bits: numbers of leading bits that training keeps, ascending, the last one equal to bits. "
        "Half of the images keep all bits, the others one of the smaller numbers. Then every prefix of a token can be "
        "decoded. Empty: all images keep all bits.",
    )

    @model_validator(mode="after")
    def _check_group_size_divides_bits(self) -> _BinaryQuantizerConfig:
        if self.entropy.estimate == "group" and self.bits % self.entropy.group_size:
            raise ValueError(f"bits {self.bits} is not a multiple of entropy.group_size {self.entropy.group_size}")
        return self

    @model_validator(mode="after")
    def _check_keep(self) -> _BinaryQuantizerConfig:
        if not self.keep:
            return self
        if len(self.keep) < 2 or sorted(set(self.keep)) != list(self.keep) or self.keep[-1] != self.bits:
            raise ValueError(
                f"keep {list(self.keep)} must ascend and end with bits {self.bits}, such as "
                f"[{max(1, self.bits // 2)}, {self.bits}]; [] keeps all bits"
            )
        if self.entropy.estimate == "group" and any(kept % self.entropy.group_size for kept in self.keep):
            raise ValueError(
                f"keep {list(self.keep)} splits groups of entropy.group_size {self.entropy.group_size} bits; use "
                "multiples of it"
            )
        return self


class BSQConfig(_BinaryQuantizerConfig):
    """Binary spherical quantization: the sign of each coordinate after projection on the unit sphere."""

    kind: Literal["bsq"] = Field("bsq", description="The quantizer.")


class LFQConfig(_BinaryQuantizerConfig):
    """Look-up free quantization: BSQ without the projection on the sphere."""

    kind: Literal["lfq"] = Field("lfq", description="The quantizer.")


class FSQConfig(StrictModel):
    """Finite scalar quantization: each channel is rounded to its number of levels."""

    kind: Literal["fsq"] = Field(description="The quantizer.")
    levels: tuple[Annotated[int, Field(ge=2, le=256)], ...] = Field(
        (8, 8, 8, 8, 8, 8), min_length=1, description="Levels of each channel."
    )

    @property
    def bits(self) -> int:
        """Bits of one token: each channel is written in the fewest bits that hold its levels."""
        return sum((n - 1).bit_length() for n in self.levels)


class VQConfig(StrictModel):
    """Vector quantization with a learned codebook."""

    kind: Literal["vq"] = Field(description="The quantizer.")
    codebook_size: int = Field(16384, ge=2, description="Codes; a power of two.")
    code_dim: int = Field(8, ge=1, description="Dimensions of a code.")
    l2_normalize: bool = Field(True, description="Compare directions instead of vectors, as ViT-VQGAN does.")
    commitment_weight: float = Field(0.25, ge=0, description="Weight of the pull towards the chosen code.")

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
    """The BSQ-ViT tokenizer: patches → encoder → quantizer → decoder → patches."""

    image_size: int = Field(128, ge=8, description="Side of the square images, pixels.")
    patch_size: int = Field(8, ge=1, description="Side of the square patch that becomes one token, pixels.")
    frames: int = Field(1, ge=1, description="Frames of the longest clip; 1 for images.")
    causal: bool = Field(True, description="In clips, a token sees only its own frame and earlier ones.")
    position: Literal["learned", "rotary"] = Field(
        "learned",
        description="Positions of tokens; learned: embeddings, and all images and frames have image_size; rotary: "
        "trained at image_size, used at any size, and attention depends on the distance of frames.",
    )
    attention_radius: int | None = Field(
        None,
        ge=1,
        description="With rotary positions, a token attends to the tokens at most this many rows and columns away, so "
        "the cost is linear in the image's size; null: to all tokens.",
    )
    position_period: int = Field(
        8,
        ge=1,
        description="With rotary positions, learned embeddings that repeat every so many rows and columns are added; "
        "must divide the rows of tokens of image_size.",
    )
    encoder: TransformerConfig = Field(TransformerConfig(), description="The ViT from patches to features.")
    decoder: DecoderConfig = Field(DecoderConfig(), description="The ViT from codes to patches.")
    quantizer: QuantizerConfig = Field(BSQConfig(), description="The bottleneck.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, a third more compute."
    )

    @property
    def grid_size(self) -> int:
        """Tokens of a frame in each direction."""
        return self.image_size // self.patch_size

    @property
    def position_rows(self) -> int:
        """Rows and columns of learned position embeddings."""
        return self.position_period if self.position == "rotary" else self.grid_size

    @property
    def temporal_positions(self) -> int:
        """Learned temporal position embeddings; 0 for images and with rotary positions."""
        return self.frames if self.frames > 1 and self.position == "learned" else 0

    @property
    def any_size(self) -> bool:
        """True if images and frames can have any size that is a multiple of the patch size."""
        return self.position == "rotary"

    @property
    def has_local_attention(self) -> bool:
        """True if a token depends on its neighborhood only, so that large images can be computed in blocks."""
        return self.attention_radius is not None

    @field_validator("quantizer", mode="before")
    @classmethod
    def _default_kind_bsq(cls, value: Any) -> Any:
        return {"kind": "bsq", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_patch_size_divides_image_size(self) -> TokenizerModelConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @model_validator(mode="after")
    def _check_rotary_positions(self) -> TokenizerModelConfig:
        if self.position == "learned" and self.attention_radius is not None:
            raise ValueError(
                "attention_radius needs relative positions; set position to rotary, or attention_radius to null"
            )
        if self.position == "rotary" and self.grid_size % self.position_period:
            raise ValueError(
                f"position_period {self.position_period} does not divide the {self.grid_size} rows of tokens of "
                f"image_size {self.image_size}; use a divisor"
            )
        for name, sizes in (("encoder", self.encoder), ("decoder", self.decoder)):
            if self.position == "rotary" and sizes.width // sizes.heads % 4:
                raise ValueError(
                    f"position rotary needs heads of a multiple of 4 features, and {name}.width {sizes.width} has "
                    f"{sizes.width // sizes.heads} per head; change {name}.heads"
                )
        return self


class TokenizerLossConfig(StrictModel):
    """Reconstruction + perceptual + adversarial + quantizer losses of the tokenizer (paper equation 2)."""

    reconstruction: Literal["l1", "l2"] = Field("l1", description="Pixel loss.")
    reconstruction_weight: float = Field(1.0, ge=0, description="Weight of the pixel loss.")
    clamp_reconstruction: bool = Field(
        False,
        description="Clamp reconstructions to [-1, 1] before the pixel loss too, as the published code does; values "
        "outside then have no gradient.",
    )
    perceptual_weight: float = Field(0.1, ge=0, description="Weight of LPIPS; 0 does not load its network.")
    perceptual_network: Literal["vgg", "alex", "alex+vgg"] = Field(
        "vgg",
        description="Network of LPIPS in training; alex+vgg: the mean of both, since each misses errors that the other "
        "sees. Evaluation uses alex.",
    )
    gram_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the texture loss: squared differences of the Gram matrices of LPIPS's feature maps.",
    )
    adversarial: AdversarialConfig = Field(AdversarialConfig(), description="The discriminator and its losses.")
    quantizer_weight: float = Field(0.1, ge=0, description="Final weight of the quantizer's penalty.")
    quantizer_weight_start_factor: float = Field(3.0, ge=0, description="Factor on that weight at step 0.")
    quantizer_weight_ramp_steps: int = Field(
        2000, ge=0, description="Steps over which that factor falls linearly to 1."
    )

    @property
    def perceptual_networks(self) -> tuple[Literal["vgg", "alex"], ...]:
        """The networks whose LPIPS distances are averaged."""
        if self.perceptual_network == "alex+vgg":
            return ("alex", "vgg")
        return (self.perceptual_network,)

    @model_validator(mode="after")
    def _check_gram_has_features(self) -> TokenizerLossConfig:
        if self.gram_weight and not self.perceptual_weight:
            raise ValueError("gram_weight uses the feature maps of LPIPS; set perceptual_weight above 0, too")
        return self


class BitNoiseConfig(StrictModel):
    """Random bit flips between quantizer and decoder, so that the decoder tolerates wrong tokens (Qiu et al., 2025)."""

    images: float = Field(0.0, ge=0, le=1, description="Share of images or clips with flipped bits; 0 flips none.")
    rate: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Highest probability with which a bit flips; each image has its own, uniform between 0 and it.",
    )
    until: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Fraction of training.steps after which no bit flips; the highest probability falls linearly to 0.",
    )


class TokenizerTrainingConfig(TrainingConfig):
    """Training run of a tokenizer: that of every model, the trained part, and bit noise."""

    only: Literal["decoder"] | None = Field(
        None,
        description="decoder: train the decoder alone, and keep the tokens of the model given by --init; null: train "
        "everything.",
    )
    bit_noise: BitNoiseConfig = Field(BitNoiseConfig(), description="Random bit flips between quantizer and decoder.")


class TokenizerConfig(StrictModel):
    """Configuration of a training run of a tokenizer."""

    stage: Literal["tokenizer"] = Field("tokenizer", description="Kind of model to train.")
    name: str = Field(min_length=1, description="Name of the run and of the model folder.")
    description: str = Field("", description="First line of the model card.")
    model: TokenizerModelConfig = Field(
        TokenizerModelConfig(), description="The network; together with the weights it determines the tokens."
    )
    loss: TokenizerLossConfig = Field(TokenizerLossConfig(), description="The objective of the generator.")
    data: DataConfig = Field(DataConfig(), description="Order of the samples and transforms to training images.")
    training: TokenizerTrainingConfig = Field(TokenizerTrainingConfig(), description="Training run.")

    @field_validator("training", mode="before")
    @classmethod
    def _accept_training_of_every_model(cls, value: Any) -> Any:
        return value.model_dump() if type(value) is TrainingConfig else value

    @model_validator(mode="after")
    def _check_3d_discriminator_has_frames(self) -> TokenizerConfig:
        if self.loss.adversarial.discriminator == "stylegan2-3d" and self.model.frames == 1:
            raise ValueError(
                "loss.adversarial.discriminator stylegan2-3d scores whole clips; set model.frames above 1, or choose "
                "stylegan2, patchgan or features, which score clips frame by frame"
            )
        return self

    @model_validator(mode="after")
    def _check_image_sizes(self) -> TokenizerConfig:
        check_crop_sizes(self.data.crop_sizes, self.model, self.loss)
        check_discriminator_sizes(self.data.crop_sizes, self.model.image_size, self.loss.adversarial)
        return self

    @model_validator(mode="after")
    def _check_bit_noise_has_signs(self) -> TokenizerConfig:
        if self.training.bit_noise.images and not isinstance(self.model.quantizer, BSQConfig | LFQConfig):
            raise ValueError(
                f"training.bit_noise flips signs, and codes of {self.model.quantizer.kind} have none; use "
                "model.quantizer.kind bsq or lfq, or set training.bit_noise.images to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_zero3_gan_accumulation(self) -> TokenizerConfig:
        training = self.training
        uses_zero3 = training.engine.kind == "deepspeed" and training.engine.zero_stage == 3
        if uses_zero3 and training.micro_batch_size is not None and self.loss.adversarial.weight:
            raise ValueError(
                "training.engine.zero_stage 3 with training.micro_batch_size accumulates wrong gradients when there is "
                "a discriminator, because its graph runs outside the engine; use zero_stage 2 or set micro_batch_size "
                "to null"
            )
        return self
