"""The BSQ-ViT tokenizer: images or clips to binary tokens and back (paper section 3).

    images ─▶ patches ─▶ encoder ─▶ to_code ─▶ quantizer ─▶ from_code ─▶ decoder ─▶ patches ─▶ images

Shape suffixes: B images or clips, T frames, N tokens (time slowest, rows before columns), L bits of a token,
C channels of a code, D width, P values of a patch. Images are floats in [-1, 1], (B, 3, H, W) or (B, 3, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from bsq_ray import config, storage
from bsq_ray.models.layers.transformer import Block, VisionTransformer
from bsq_ray.models.pretrained import Pretrained
from bsq_ray.models.quantizers import Quantized, build_quantizer
from bsq_ray.models.streaming import Window

# A transformer over whole clips, or a window of it over what comes next.
Body = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch.

    Attributes:
        bits_BNL: bool; dimension 1 is the least significant bit.
        grid: (t, h, w) with t·h·w = N.
    """

    bits_BNL: Tensor
    grid: tuple[int, int, int]


class TokenizerOutput(NamedTuple):
    """What a training step needs: unclamped fp32 images of the input's shape, and what the quantiser returned."""

    images: Tensor
    quantized: Quantized


class Encoder(nn.Module):
    """Patches to features: one linear layer per patch, then the transformer."""

    def __init__(self, model: config.TokenizerModel) -> None:
        super().__init__()
        # No bias: the norm that follows the position embedding would remove it.
        self.patch_embedding = nn.Linear(3 * model.patch_size**2, model.encoder.width, bias=False)
        self.transformer = _transformer(model, model.encoder)
        nn.init.trunc_normal_(self.patch_embedding.weight, std=0.02)

    def forward(self, patches_BNP: Tensor, body: Body | None = None) -> Tensor:
        """(B, N, P) to (B, N, D); `body` stands in for the transformer."""
        return (body or self.transformer)(self.patch_embedding(patches_BNP))


class Decoder(nn.Module):
    """Features to patches: the transformer, then Linear-Tanh-Linear on each token."""

    def __init__(self, model: config.TokenizerModel) -> None:
        super().__init__()
        sizes = model.decoder
        self.transformer = _transformer(model, sizes)
        self.head = nn.Sequential(
            nn.Linear(sizes.width, sizes.head_width), nn.Tanh(), nn.Linear(sizes.head_width, 3 * model.patch_size**2)
        )
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x_BND: Tensor, body: Body | None = None) -> Tensor:
        """(B, N, D) to (B, N, P); `body` stands in for the transformer."""
        return cast(Tensor, self.head((body or self.transformer)(x_BND)))


def _transformer(model: config.TokenizerModel, sizes: config.Transformer) -> VisionTransformer:
    frame_tokens = (model.image_size // model.patch_size) ** 2
    return VisionTransformer(sizes, frame_tokens, model.frames, model.causal, model.gradient_checkpointing)


class Tokenizer(Pretrained[config.TokenizerModel]):
    """An image tokenizer, or with `frames` > 1 a video tokenizer for which an image is a clip of one frame."""

    run_type = config.TokenizerConfig

    def __init__(self, model: config.TokenizerModel) -> None:
        super().__init__(model)
        self.encoder = Encoder(model)
        self.quantizer = build_quantizer(model.quantizer)
        self.to_code = nn.Linear(model.encoder.width, self.quantizer.channels)
        self.from_code = nn.Linear(self.quantizer.channels, model.decoder.width)
        self.decoder = Decoder(model)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the final linear layer, at which adaptive GAN weights compare gradients."""
        return cast(nn.Linear, self.decoder.head[-1]).weight

    @property
    def blocks(self) -> list[Block]:
        """Every transformer block, encoder first; `block.compile()` on each compiles the model in place."""
        return [cast(Block, b) for part in (self.encoder, self.decoder) for b in part.transformer.blocks]

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstructs through the quantiser with gradients.

        Raises:
            ValueError: the images are not of the model's size.
        """
        clips_B3THW = self._as_clips(images, self.config.frames)
        quantized = self.quantizer(self._features(clips_B3THW))
        clips_B3THW = self._images(quantized.codes_BNC, self._grid(clips_B3THW))
        return TokenizerOutput(clips_B3THW.reshape(images.shape), quantized)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tokens:
        """Images (B, 3, H, W) or clips (B, 3, T, H, W) in [-1, 1] to their tokens.

        Raises:
            ValueError: the images are not of the model's size.
        """
        return self._encode(self._as_clips(images, self.config.frames))

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Tokens to images (B, 3, H, W), or clips (B, 3, T, H, W) if the grid has several frames, fp32 in [-1, 1].

        Raises:
            ValueError: grid or bits are not of this model.
        """
        clips_B3THW = self._decode(self._checked(tokens, self.config.frames))
        return clips_B3THW.squeeze(2) if tokens.grid[0] == 1 else clips_B3THW

    def encode_stream(self, chunks: Iterable[Tensor], overlap: int | None = None) -> Iterator[Tokens]:
        """The tokens of each chunk of a clip of any length, as soon as it comes; see `models.streaming`.

        Args:
            chunks: consecutive frames, (B, 3, H, W) or (B, 3, t, H, W) with any t, in [-1, 1].
            overlap: frames that stay in sight when a clip outgrows the model's frames; by default half of them.

        Raises:
            ValueError: the model is not causal, the overlap is not below its frames, or a chunk is not of its size.
        """
        window = Window(self.encoder.transformer, overlap)
        return (self._encode(self._as_clips(chunk), window.push) for chunk in chunks)

    def decode_stream(self, chunks: Iterable[Tokens], overlap: int | None = None) -> Iterator[Tensor]:
        """The pixels (B, 3, t, H, W), fp32 in [-1, 1], of each chunk of tokens, as soon as it comes.

        Args:
            chunks: tokens of consecutive frames, however many at once.
            overlap: as in `encode_stream`.

        Raises:
            ValueError: the model is not causal, the overlap is not below its frames, or tokens are not of this model.
        """
        window = Window(self.decoder.transformer, overlap)
        return (self._decode(self._checked(chunk), window.push) for chunk in chunks)

    def reconstruct(self, images: Tensor) -> Tensor:
        """What is left of the images after encoding and decoding: fp32 of the same shape, in [-1, 1]."""
        return self.decode(self.encode(images)).reshape(images.shape)

    @classmethod
    def of_tokens(cls, url: str, section: config.TokenModel) -> Tokenizer:
        """The tokenizer kept in the folder of a model of tokens.

        Args:
            url: the model's folder; the tokenizer is in `tokenizer/`.
            section: the model section of its configuration.

        Raises:
            ValueError: there is none, or it is not the one that the model was trained with.
        """
        kept = storage.join(url, "tokenizer")
        tokenizer = cls.from_pretrained(kept)
        if section.tokenizer not in (None, tokenizer.model_id):
            raise ValueError(
                f"{kept} is the tokenizer {str(tokenizer.model_id)[:12]}, but the model in {url} "
                f"was trained on tokens of {str(section.tokenizer)[:12]}; put that one there"
            )
        return tokenizer

    @torch.no_grad()
    def _encode(self, clips_B3THW: Tensor, body: Body | None = None) -> Tokens:
        bits_BNL = self.quantizer(self._features(clips_B3THW, body)).bits_BNL
        return Tokens(bits_BNL, self._grid(clips_B3THW))

    @torch.no_grad()
    def _decode(self, tokens: Tokens, body: Body | None = None) -> Tensor:
        return self._images(self.quantizer.codes(tokens.bits_BNL), tokens.grid, body).clamp(-1, 1)

    def _features(self, clips_B3THW: Tensor, body: Body | None = None) -> Tensor:
        patches_BNP = patchify(clips_B3THW, self.config.patch_size)
        return cast(Tensor, self.to_code(self.encoder(patches_BNP.to(self.to_code.weight.dtype), body)))

    def _images(self, codes_BNC: Tensor, grid: tuple[int, int, int], body: Body | None = None) -> Tensor:
        patches_BNP = self.decoder(self.from_code(codes_BNC.to(self.from_code.weight.dtype)), body)
        return unpatchify(patches_BNP, grid, self.config.patch_size).float()

    def _grid(self, clips_B3THW: Tensor) -> tuple[int, int, int]:
        side = self.config.image_size // self.config.patch_size
        return clips_B3THW.shape[2], side, side

    def _as_clips(self, images: Tensor, longest: int | None = None) -> Tensor:
        """(B, 3, H, W) becomes (B, 3, 1, H, W); anything the model cannot take is refused."""
        size = self.config.image_size
        shape = tuple(images.shape)
        if images.ndim not in (4, 5) or shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W) or (B, 3, T, H, W), got {shape}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
        if shape[-2:] != (size, size):
            patch = self.config.patch_size
            uneven = "" if not (shape[-2] % patch or shape[-1] % patch) else f", which is not a multiple of {patch},"
            raise ValueError(
                f"images are {shape[-1]} x {shape[-2]} pixels{uneven} but this model takes {size} x {size}; "
                "resize or crop them first"
            )
        clips_B3THW = images.unsqueeze(2) if images.ndim == 4 else images
        frames = clips_B3THW.shape[2]
        if frames < 1 or (longest is not None and frames > longest):
            raise ValueError(f"clips have {frames} frames, but this model takes {_frames_told(longest)}")
        return clips_B3THW

    def _checked(self, tokens: Tokens, longest: int | None = None) -> Tokens:
        t, h, w = tokens.grid
        side = self.config.image_size // self.config.patch_size
        if t < 1 or (longest is not None and t > longest) or not h == w == side:
            raise ValueError(
                f"tokens have the grid {tokens.grid}, but this model takes ({_frames_told(longest)}, {side}, {side})"
            )
        expected = (t * h * w, self.quantizer.bits)
        if tokens.bits_BNL.dtype != torch.bool or tuple(tokens.bits_BNL.shape[1:]) != expected:
            raise ValueError(
                f"tokens must be booleans of shape (B, {expected[0]}, {expected[1]}), "
                f"got {tokens.bits_BNL.dtype} {tuple(tokens.bits_BNL.shape)}"
            )
        return tokens


def _frames_told(longest: int | None) -> str:
    return "1 or more" if longest is None else f"1 to {longest}"


def patchify(clips_B3THW: Tensor, patch: int) -> Tensor:
    """(B, 3, T, H, W) to (B, N, 3·patch²); the values of a patch are ordered channel, row, column."""
    x = clips_B3THW.unfold(3, patch, patch).unfold(4, patch, patch)  # B 3 T h w patch patch
    return x.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3)


def unpatchify(patches_BNP: Tensor, grid: tuple[int, int, int], patch: int) -> Tensor:
    """The inverse of `patchify`: (B, t·h·w, 3·patch²) to (B, 3, t, h·patch, w·patch)."""
    x = patches_BNP.unflatten(1, grid).unflatten(-1, (3, patch, patch))  # B t h w 3 patch patch
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
