"""Pre-LN vision transformer: the body that the tokenizer's encoder and decoder share.

In a causal transformer the tokens of a frame attend to their own frame and to those before it, frame by frame:

    queries of frame 0 ─▶ keys of frame 0
    queries of frame 1 ─▶ keys of frames 0, 1
    queries of frame 2 ─▶ keys of frames 0, 1, 2      No mask is made, and no pair that it would forbid is computed.

Shape suffixes: B clips, T frames, S tokens of one frame, N = T·S tokens of a clip (time slowest, rows before columns),
M tokens of the clip and of what came before it, D width, H attention heads, E width of one head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsq_ray import config
from bsq_ray.models.layers.attention import attention


class KeyValueCache:
    """Keys and values that one attention has computed, so that a clip can go on from where it stands.

    Args:
        tokens: how many there is room for.

    Attributes:
        length: how many there are.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._key_values: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BHNE: Tensor, v_BHNE: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values, and returns all of them so far, (B, H, M, E) each."""
        if self._key_values is None:
            batch, heads, _, width = k_BHNE.shape
            self._key_values = cast(
                tuple[Tensor, Tensor], k_BHNE.new_empty(2, batch, heads, self.capacity, width).unbind()
            )
        start, self.length = self.length, self.length + k_BHNE.shape[2]
        assert self.length <= self.capacity
        for buffer, new in zip(self._key_values, (k_BHNE, v_BHNE), strict=True):
            buffer[:, :, start : self.length] = new
        return self._key_values[0][:, :, : self.length], self._key_values[1][:, :, : self.length]


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases; query, key and value come from one projection, in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, span: int, cache: KeyValueCache | None = None) -> Tensor:
        """Each span of tokens attends to itself, to the spans before it, and to what is in the cache."""
        q_BHNE, k_BHNE, v_BHNE = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:
            k_BHNE, v_BHNE = cache.extend(k_BHNE, v_BHNE)
        return cast(Tensor, self.out(attend(q_BHNE, k_BHNE, v_BHNE, span).flatten(2)))


def attend(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, span: int) -> Tensor:
    """Attention of each span of queries to its own span of keys and to all keys before it, (B, N, H, E).

    Args:
        k_BHME, v_BHME: the last N are those of the queries' own tokens.
        span: tokens of a frame; all N of them for attention without an order.
    """
    parts = []
    spans = q_BHNE.split(span, 2)
    for q_BHSE, k, v in zip(
        spans, _causal_prefixes(k_BHME, len(spans), span), _causal_prefixes(v_BHME, len(spans), span), strict=True
    ):
        parts.append(attention(q_BHSE, k, v).transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _causal_prefixes(x_BHME: Tensor, num_spans: int, span: int) -> list[Tensor]:
    """What there is up to the end of each of the last `count` spans.

    Each is cut from the next longer one: cut from the whole, its gradient would be padded to the length of the whole.
    """
    prefixes = [x_BHME]
    while len(prefixes) < num_spans:
        prefixes.append(prefixes[-1][:, :, :-span])
    return prefixes[::-1]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the unit to compile, checkpoint or shard."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden_dim = int(width * mlp_ratio)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, width))

    def forward(self, x_BND: Tensor, span: int, cache: KeyValueCache | None = None) -> Tensor:
        """Same shape out as in; span and cache as in `SelfAttention`."""
        x_BND = x_BND + self.attention(self.attention_norm(x_BND), span, cache)
        return x_BND + cast(Tensor, self.mlp(self.mlp_norm(x_BND)))


class VisionTransformer(nn.Module):
    """Position embeddings, a norm, the blocks, a norm.

    The position of a token is the sum of a learned spatial and, for clips, a learned temporal embedding. The temporal
    one starts at zero, so that a video model initialised from an image model begins by treating each frame alike.

    Args:
        sizes: width, layers, heads and MLP ratio.
        frame_tokens: tokens of one frame (S).
        frames: the longest clip; 1 for images.
        causal: whether a token attends only to its own and earlier frames.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        transformer_config: config.TransformerConfig,
        tokens_per_frame: int,
        frames: int,
        causal: bool,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.frames = frames
        self.gradient_checkpointing = gradient_checkpointing
        self.spatial_position = nn.Parameter(torch.empty(tokens_per_frame, transformer_config.width))
        self.temporal_position = nn.Parameter(torch.empty(frames, transformer_config.width)) if frames > 1 else None
        self.input_norm = nn.LayerNorm(transformer_config.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(transformer_config.width, transformer_config.heads, transformer_config.mlp_ratio)
            for _ in range(transformer_config.layers)
        )
        self.output_norm = nn.LayerNorm(transformer_config.width)
        self._init_weights()

    def forward(self, x_BND: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Same shape out as in; N is 1 to `frames` times `frame_tokens`.

        Args:
            caches: of every block, from `new_caches`: x follows the frames that they hold, and is added to them.
        """
        tokens_per_frame, _ = self.spatial_position.shape
        frames = x_BND.shape[1] // tokens_per_frame
        position_TSD = self.spatial_position.expand(frames, -1, -1)
        if self.temporal_position is not None:
            first = caches[0].length // tokens_per_frame if caches else 0
            position_TSD = position_TSD + self.temporal_position[first : first + frames, None]
        span = tokens_per_frame if self.causal else x_BND.shape[1]
        x_BND = self.input_norm(x_BND + position_TSD.flatten(0, 1))
        for index, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no generator state to keep.
                x_BND = checkpoint(block, x_BND, span, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BND = block(x_BND, span, caches[index] if caches else None)
        return cast(Tensor, self.output_norm(x_BND))

    def new_caches(self) -> list[KeyValueCache]:
        """Empty caches for a clip of up to `frames` frames that comes piece by piece, without gradients."""
        return [KeyValueCache(self.frames * len(self.spatial_position)) for _ in self.blocks]

    def _init_weights(self) -> None:
        nn.init.normal_(self.spatial_position, std=0.02)
        if self.temporal_position is not None:
            nn.init.zeros_(self.temporal_position)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
