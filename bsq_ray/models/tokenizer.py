"""The BSQ-ViT tokenizer: images or clips to binary tokens and back (paper section 3).

    images ─▶ patches ─▶ encoder ─▶ to_code ─▶ quantizer ─▶ from_code ─▶ decoder ─▶ patches ─▶ images

Shape suffixes: B images or clips, T frames, H and W pixels, N tokens (time slowest, rows before columns), L bits of a
token, C channels of a code, D width, P values of a patch.

`images_BCHW_or_BCTHW` are floats in [-1, 1]: images (B, 3, H, W) or clips (B, 3, T, H, W). With rotary positions, H and
W are any multiples of the patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.models.layers.local_attention import RotaryPositions
from bsq_ray.models.layers.mlp import init_weights
from bsq_ray.models.layers.transformer import TransformerBlock, VisionTransformer
from bsq_ray.models.pretrained import PretrainedModel
from bsq_ray.models.quantizers import BinaryQuantizer, KeptBits, Quantized, build_quantizer, flip_signs
from bsq_ray.models.streaming import StreamingWindow

# `StreamingWindow.push` over the next frames, given rows and columns of tokens of a frame.
TransformerFn = Callable[[Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch.

    Attributes:
        bits_BNL: bool; index 0 of L is the least significant bit.
        grid: frames, rows and columns (t, h, w) with t·h·w = N.
    """

    bits_BNL: Tensor
    grid: tuple[int, int, int]

    def first(self, num_bits: int) -> Tokens:
        """Return the tokens with their first `num_bits` bits, which a tokenizer with nested bits can decode.

        Raises:
            ValueError: the tokens have fewer bits, or `num_bits` is below 1.
        """
        max_bits = self.bits_BNL.shape[-1]
        if not 1 <= num_bits <= max_bits:
            raise ValueError(f"cannot keep {num_bits} bits of tokens of {max_bits} bits; use 1 to {max_bits}")
        return Tokens(self.bits_BNL[..., :num_bits], self.grid)


class TokenizerOutput(NamedTuple):
    """Output of a training step: unclamped fp32 images of the input's shape, and the quantizer's result."""

    images: Tensor
    quantized: Quantized


class Encoder(nn.Module):
    """Maps patches to features: a linear layer on each patch, then the transformer."""

    def __init__(self, model_config: config.TokenizerModelConfig) -> None:
        super().__init__()
        # No bias: the norm that follows the position embedding would remove it.
        self.patch_embedding = nn.Linear(3 * model_config.patch_size**2, model_config.encoder.width, bias=False)
        self.transformer = _build_transformer(model_config, model_config.encoder)
        init_weights(self.patch_embedding)

    def forward(
        self, patches_BNP: Tensor, grid: tuple[int, int], transformer_fn: TransformerFn | None = None
    ) -> Tensor:
        """Map patches (B, N, P) of frames with a grid of rows and columns to features (B, N, D).

        `transformer_fn` replaces the transformer.
        """
        return _run_transformer(self.transformer, self.patch_embedding(patches_BNP), grid, transformer_fn)


class Decoder(nn.Module):
    """Maps features to patches: the transformer, then Linear-Tanh-Linear on each token."""

    def __init__(self, model_config: config.TokenizerModelConfig) -> None:
        super().__init__()
        decoder_config = model_config.decoder
        self.transformer = _build_transformer(model_config, decoder_config)
        self.head = nn.Sequential(
            nn.Linear(decoder_config.width, decoder_config.head_hidden_dim),
            nn.Tanh(),
            nn.Linear(decoder_config.head_hidden_dim, 3 * model_config.patch_size**2),
        )
        init_weights(self.head)

    def forward(self, x_BND: Tensor, grid: tuple[int, int], transformer_fn: TransformerFn | None = None) -> Tensor:
        """Map features (B, N, D) of frames with a grid of rows and columns to patches (B, N, P).

        `transformer_fn` replaces the transformer.
        """
        return cast(Tensor, self.head(_run_transformer(self.transformer, x_BND, grid, transformer_fn)))


def _run_transformer(
    transformer: VisionTransformer, x_BND: Tensor, grid: tuple[int, int], transformer_fn: TransformerFn | None
) -> Tensor:
    if transformer_fn is not None:
        return transformer_fn(x_BND, grid)
    return cast(Tensor, transformer(x_BND, grid=grid))


def _build_transformer(
    model_config: config.TokenizerModelConfig, transformer_config: config.TransformerConfig
) -> VisionTransformer:
    return VisionTransformer(
        transformer_config,
        model_config.grid_size**2,
        model_config.frames,
        model_config.causal,
        model_config.gradient_checkpointing,
        _rotary_positions(model_config),
    )


def _rotary_positions(model_config: config.TokenizerModelConfig) -> RotaryPositions | None:
    if model_config.position == "learned":
        return None
    return RotaryPositions(model_config.attention_radius, model_config.position_period, model_config.frames)


class Tokenizer(PretrainedModel[config.TokenizerModelConfig]):
    """Image tokenizer, or with `frames` > 1 video tokenizer. To a video tokenizer an image is a clip of one frame."""

    run_config_class = config.TokenizerConfig

    def __init__(self, model_config: config.TokenizerModelConfig) -> None:
        super().__init__(model_config)
        self.encoder = Encoder(model_config)
        self.quantizer = build_quantizer(model_config.quantizer)
        self.to_code = nn.Linear(model_config.encoder.width, self.quantizer.channels)
        self.from_code = nn.Linear(self.quantizer.channels, model_config.decoder.width)
        self.decoder = Decoder(model_config)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the final linear layer, where adaptive GAN weights compare gradients."""
        return cast(nn.Linear, self.decoder.head[-1]).weight

    @property
    def blocks(self) -> list[TransformerBlock]:
        """All transformer blocks, encoder first; `block.compile()` on each compiles the model in place."""
        return [cast(TransformerBlock, b) for part in (self.encoder, self.decoder) for b in part.transformer.blocks]

    def forward(
        self,
        images_BCHW_or_BCTHW: Tensor,
        batch_statistics: Tensor | None = None,
        kept_bits: KeptBits | None = None,
        flipped_BNL: Tensor | None = None,
    ) -> TokenizerOutput:
        """Reconstruct through the quantizer, with gradients.

        Args:
            batch_statistics: mean of `batch_statistics` over all parts, if the images are a part of a batch.
            kept_bits: nested bits: the number of bits from which each image is reconstructed; None: all bits.
            flipped_BNL: bits of binary codes that flip before the decoder, bool; None: none.

        Raises:
            ValueError: the size of the images differs from the model's.
        """
        clips_B3THW = self._as_clips(images_BCHW_or_BCTHW, self.config.frames)
        quantized = self.quantizer(self._features(clips_B3THW), batch_statistics, kept_bits)
        codes_BNC = quantized.codes_BNC if flipped_BNL is None else flip_signs(quantized.codes_BNC, flipped_BNL)
        clips_B3THW = self._images(codes_BNC, self._grid(clips_B3THW))
        return TokenizerOutput(clips_B3THW.reshape(images_BCHW_or_BCTHW.shape), quantized)

    @torch.no_grad()
    def batch_statistics(self, images_BCHW_or_BCTHW: Tensor, kept_bits: KeptBits | None = None) -> Tensor | None:
        """Return the quantizer's statistics of images, see `Quantizer.batch_statistics`; runs the encoder only."""
        clips_B3THW = self._as_clips(images_BCHW_or_BCTHW, self.config.frames)
        return self.quantizer.batch_statistics(self._features(clips_B3THW), kept_bits)

    @torch.no_grad()
    def features(self, images_BCHW_or_BCTHW: Tensor) -> Tensor:
        """Return the vectors (B, N, C) that `encode` quantizes; arguments and errors as of `encode`."""
        return self._features(self._as_clips(images_BCHW_or_BCTHW, self.config.frames))

    @torch.no_grad()
    def encode(self, images_BCHW_or_BCTHW: Tensor) -> Tokens:
        """Encode images (B, 3, H, W) or clips (B, 3, T, H, W) in [-1, 1] to tokens.

        Raises:
            ValueError: the size of the images differs from the model's.
        """
        return self._encode(self._as_clips(images_BCHW_or_BCTHW, self.config.frames))

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Decode tokens to images (B, 3, H, W), or clips (B, 3, T, H, W) if T > 1; fp32 in [-1, 1].

        A tokenizer with nested bits (`model.quantizer.keep`) also decodes tokens with fewer bits, see `Tokens.first`.

        Raises:
            ValueError: the grid or the number of bits differs from the model's.
        """
        self._check_has_all_bits(tokens)
        return self.decode_cut_bits(tokens)

    @torch.no_grad()
    def decode_cut_bits(self, tokens: Tokens) -> Tensor:
        """Decode like `decode`, with fewer bits also if the tokenizer was not trained for it: a baseline.

        Raises:
            ValueError: the grid differs from the model's, the tokens have more bits than the model's, or fewer and the
                codes of its quantizer have no meaningful prefix (FSQ, VQ).
        """
        clips_B3THW = self._decode(self._validate_tokens(tokens, self.config.frames))
        return clips_B3THW.squeeze(2) if tokens.grid[0] == 1 else clips_B3THW

    def encode_stream(self, chunks: Iterable[Tensor], overlap: int | None = None) -> Iterator[Tokens]:
        """Encode a clip of any length chunk by chunk; see `models.streaming`.

        Args:
            chunks: consecutive frames, (B, 3, H, W) or (B, 3, t, H, W) with any t, in [-1, 1].
            overlap: frames kept when the window slides; by default half of the model's frames.

        Raises:
            ValueError: the model is not causal, `overlap` is not below the model's frames, or a chunk has another size.
        """
        window = StreamingWindow(self.encoder.transformer, overlap)
        return (self._encode(self._as_clips(chunk), window.push) for chunk in chunks)

    def decode_stream(self, chunks: Iterable[Tokens], overlap: int | None = None) -> Iterator[Tensor]:
        """Decode tokens of a clip chunk by chunk to pixels (B, 3, t, H, W), fp32 in [-1, 1].

        Args:
            chunks: tokens of consecutive frames, any number of frames in each chunk.
            overlap: as in `encode_stream`.

        Raises:
            ValueError: the model is not causal, `overlap` is not below the model's frames, or the grid or the number of
                bits differs from the model's.
        """
        window = StreamingWindow(self.decoder.transformer, overlap)
        return (self._decode(self._validate_chunk(chunk), window.push) for chunk in chunks)

    def reconstruct(self, images_BCHW_or_BCTHW: Tensor) -> Tensor:
        """Encode and decode images; return fp32 images of the same shape in [-1, 1]."""
        return self.decode(self.encode(images_BCHW_or_BCTHW)).reshape(images_BCHW_or_BCTHW.shape)

    @classmethod
    def from_token_model(cls, url: str, model_config: config.TokenModelConfig) -> Tokenizer:
        """Load the tokenizer bundled with a token model.

        Args:
            url: folder of the token model; the tokenizer is in `tokenizer/`.
            model_config: configuration of the token model.

        Raises:
            ValueError: the folder has no tokenizer, or the model was trained on the tokens of another one.
        """
        from bsq_ray import model_folder, storage

        tokenizer_url = storage.join(model_folder.absolute_url(url), "tokenizer")
        tokenizer = cls.from_pretrained(tokenizer_url)
        if not model_config.accepts_tokens(tokenizer.model_id, tokenizer.tokens_id):
            raise ValueError(
                f"{tokenizer_url} contains tokenizer {str(tokenizer.model_id)[:12]}, but the model in {url} "
                f"was trained on tokens of {str(model_config.tokenizer)[:12]}; put that tokenizer there, or one whose "
                "decoder alone was trained further"
            )
        return tokenizer

    @torch.no_grad()
    def _encode(self, clips_B3THW: Tensor, transformer_fn: TransformerFn | None = None) -> Tokens:
        bits_BNL = self.quantizer(self._features(clips_B3THW, transformer_fn)).bits_BNL
        return Tokens(bits_BNL, self._grid(clips_B3THW))

    @torch.no_grad()
    def _decode(self, tokens: Tokens, transformer_fn: TransformerFn | None = None) -> Tensor:
        return self._images(self.quantizer.dequantize(tokens.bits_BNL), tokens.grid, transformer_fn).clamp(-1, 1)

    def _features(self, clips_B3THW: Tensor, transformer_fn: TransformerFn | None = None) -> Tensor:
        patches_BNP = patchify(clips_B3THW, self.config.patch_size).to(self.to_code.weight.dtype)
        features_BND = self.encoder(patches_BNP, self._grid(clips_B3THW)[1:], transformer_fn)
        return cast(Tensor, self.to_code(features_BND))

    def _images(
        self, codes_BNC: Tensor, grid: tuple[int, int, int], transformer_fn: TransformerFn | None = None
    ) -> Tensor:
        x_BND = self.from_code(codes_BNC.to(self.from_code.weight.dtype))
        patches_BNP = self.decoder(x_BND, grid[1:], transformer_fn)
        return unpatchify(patches_BNP, grid, self.config.patch_size).float()

    def _grid(self, clips_B3THW: Tensor) -> tuple[int, int, int]:
        frames, height, width = clips_B3THW.shape[2:]
        return frames, height // self.config.patch_size, width // self.config.patch_size

    def _as_clips(self, images: Tensor, max_frames: int | None = None) -> Tensor:
        """Check the images and insert the time dimension of (B, 3, H, W)."""
        size = self.config.image_size
        shape = tuple(images.shape)
        if images.ndim not in (4, 5) or shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W) or (B, 3, T, H, W), got {shape}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
        patch_size = self.config.patch_size
        is_multiple = shape[-2] % patch_size == 0 and shape[-1] % patch_size == 0
        if not (is_multiple and min(shape[-2:]) > 0 if self.config.any_size else shape[-2:] == (size, size)):
            patch_note = "" if is_multiple else f", which is not a multiple of {patch_size}"
            sizes = f"sides that are multiples of {patch_size}" if self.config.any_size else f"{size} x {size}"
            raise ValueError(
                f"images are {shape[-1]} x {shape[-2]} pixels{patch_note}, but this model takes {sizes}; "
                "resize or crop them first"
            )
        clips_B3THW = images.unsqueeze(2) if images.ndim == 4 else images
        frames = clips_B3THW.shape[2]
        if frames < 1 or (max_frames is not None and frames > max_frames):
            raise ValueError(f"clips have {frames} frames, but this model takes {_format_frames(max_frames)}")
        return clips_B3THW

    def _validate_tokens(self, tokens: Tokens, max_frames: int | None = None) -> Tokens:
        t, h, w = tokens.grid
        side = self.config.grid_size
        is_valid_size = min(h, w) > 0 if self.config.any_size else h == w == side
        if t < 1 or (max_frames is not None and t > max_frames) or not is_valid_size:
            sides = "any rows, any columns" if self.config.any_size else f"{side}, {side}"
            raise ValueError(
                f"tokens have grid {tokens.grid}, but this model takes ({_format_frames(max_frames)}, {sides})"
            )
        num_tokens, num_bits = t * h * w, self.quantizer.bits
        shape = tuple(tokens.bits_BNL.shape)
        has_prefixes = isinstance(self.quantizer, BinaryQuantizer)
        min_bits = 1 if has_prefixes else num_bits
        is_valid = len(shape) == 3 and shape[1] == num_tokens and min_bits <= shape[2] <= num_bits
        if tokens.bits_BNL.dtype != torch.bool or not is_valid:
            raise ValueError(
                f"tokens must be booleans of shape (B, {num_tokens}, {num_bits}), got {tokens.bits_BNL.dtype} {shape}"
            )
        return tokens

    def _validate_chunk(self, tokens: Tokens) -> Tokens:
        self._check_has_all_bits(tokens)
        return self._validate_tokens(tokens)

    def _check_has_all_bits(self, tokens: Tokens) -> None:
        """Raise if tokens have fewer bits than the model's and it has no nested bits."""
        shape, num_bits = tuple(tokens.bits_BNL.shape), self.quantizer.bits
        if not self.quantizer.is_nested and len(shape) == 3 and 1 <= shape[2] < num_bits:
            keep = f"model.quantizer.keep=[{max(1, num_bits // 2)},{num_bits}]"
            other = "" if isinstance(self.quantizer, BinaryQuantizer) else "model.quantizer.kind=bsq and "
            raise ValueError(
                f"tokens have {shape[2]} of {num_bits} bits, but this model decodes all of them only: tokens must be "
                f"booleans of shape (B, {shape[1]}, {num_bits}); train a tokenizer with nested bits, such as "
                f"{other}{keep}, to decode fewer"
            )


def _format_frames(max_frames: int | None) -> str:
    return "1 or more" if max_frames is None else f"1 to {max_frames}"


def patchify(clips_B3THW: Tensor, patch_size: int) -> Tensor:
    """Cut clips (B, 3, T, H, W) into patches (B, N, 3·patch²); values are ordered channel, row, column."""
    x = clips_B3THW.unfold(3, patch_size, patch_size).unfold(4, patch_size, patch_size)  # B 3 T h w patch patch
    return x.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3)


def unpatchify(patches_BNP: Tensor, grid: tuple[int, int, int], patch_size: int) -> Tensor:
    """Invert `patchify`: (B, t·h·w, 3·patch²) to (B, 3, t, h·patch, w·patch)."""
    x = patches_BNP.unflatten(1, grid).unflatten(-1, (3, patch_size, patch_size))  # B t h w 3 patch patch
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
