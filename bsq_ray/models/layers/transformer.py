"""Pre-LN vision transformer, used by the tokenizer's encoder and decoder.

In a causal transformer the tokens of a frame attend to their own frame and to earlier frames, frame by frame. There is
no attention mask, and masked pairs are not computed:

    queries of frame 0 ─▶ keys of frame 0
    queries of frame 1 ─▶ keys of frames 0, 1
    queries of frame 2 ─▶ keys of frames 0, 1, 2

With rotary positions a frame has any number of rows and columns (see `local_attention`).

Shape suffixes: B clips, T frames, S tokens of one frame, N = T·S tokens of a clip (time slowest, rows before columns),
M tokens of the clip and of the cached frames before it, D width, H attention heads, E width of one head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsq_ray import config
from bsq_ray.models.layers.attention import span_attention, split_heads
from bsq_ray.models.layers.kv_cache import KeyValueCache
from bsq_ray.models.layers.local_attention import Neighborhood, RotaryPositions, local_attention, rotate
from bsq_ray.models.layers.mlp import build_mlp, init_weights


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases; one projection computes query, key and value in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_BND: Tensor,
        span: int,
        cache: KeyValueCache | None = None,
        neighborhood: Neighborhood | None = None,
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); each span of tokens attends to itself, to earlier spans and to the cache.

        With a neighborhood, a token attends to those of these tokens that are near it. Cached keys are rotated.
        """
        q_BHNE, k_BHNE, v_BHNE = split_heads(self.qkv(x_BND), self.heads)
        if neighborhood is not None:
            q_BHNE, k_BHNE = rotate(q_BHNE, neighborhood), rotate(k_BHNE, neighborhood)
        if cache is not None:
            k_BHNE, v_BHNE = cache.extend(k_BHNE, v_BHNE)
        if neighborhood is None:
            y_BNHE = span_attention(q_BHNE, k_BHNE, v_BHNE, (span, span))
        else:
            y_BNHE = local_attention(q_BHNE, k_BHNE, v_BHNE, span, neighborhood)
        return cast(Tensor, self.out(y_BNHE.flatten(2)))


class TransformerBlock(nn.Module):
    """Pre-LN block: x + attention(norm(x)), then x + mlp(norm(x)). The unit to compile, checkpoint or shard."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = build_mlp(width, mlp_ratio)

    def forward(
        self,
        x_BND: Tensor,
        span: int,
        cache: KeyValueCache | None = None,
        neighborhood: Neighborhood | None = None,
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); the other arguments as in `SelfAttention`."""
        x_BND = x_BND + self.attention(self.attention_norm(x_BND), span, cache, neighborhood)
        return x_BND + cast(Tensor, self.mlp(self.mlp_norm(x_BND)))


class VisionTransformer(nn.Module):
    """Position embeddings, a norm, the blocks, a norm.

    The position embedding of a token is the sum of a learned spatial and, for clips, a learned temporal embedding. The
    temporal embedding starts at zero, so a video model inflated from an image model starts by treating frames equally.
    With rotary positions there is no temporal embedding; attention depends on the distance of frames.

    Args:
        transformer_config: width, layers, heads and MLP ratio.
        tokens_per_frame: tokens of one frame (S).
        frames: maximum number of frames; 1 for images.
        causal: whether a token attends only to its own and earlier frames.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        rotary: rotary instead of learned positions.
    """

    def __init__(
        self,
        transformer_config: config.TransformerConfig,
        tokens_per_frame: int,
        frames: int,
        causal: bool,
        gradient_checkpointing: bool,
        rotary: RotaryPositions | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.frames = frames
        self.tokens_per_frame = tokens_per_frame
        self.gradient_checkpointing = gradient_checkpointing
        self.rotary = rotary
        self.head_dim = transformer_config.width // transformer_config.heads
        num_positions = rotary.period**2 if rotary else tokens_per_frame
        self.spatial_position = nn.Parameter(torch.empty(num_positions, transformer_config.width))
        has_temporal = frames > 1 and rotary is None
        self.temporal_position = nn.Parameter(torch.empty(frames, transformer_config.width)) if has_temporal else None
        self.input_norm = nn.LayerNorm(transformer_config.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(transformer_config.width, transformer_config.heads, transformer_config.mlp_ratio)
            for _ in range(transformer_config.layers)
        )
        self.output_norm = nn.LayerNorm(transformer_config.width)
        self._init_weights()

    def forward(
        self, x_BND: Tensor, caches: list[KeyValueCache] | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Map (B, N, D) to (B, N, D); N is 1 to `frames` times `tokens_per_frame`.

        Args:
            caches: one per block, from `new_caches`. x continues the cached frames and is appended to the caches.
            grid: rows and columns of a frame, by default those of training; required with rotary positions.
        """
        tokens_per_frame = grid[0] * grid[1] if grid else self.tokens_per_frame
        first_frame = caches[0].length // tokens_per_frame if caches else 0
        frames = range(first_frame, first_frame + x_BND.shape[1] // tokens_per_frame)
        neighborhood = None
        if self.rotary is None:
            x_BND = x_BND + self._learned_positions(frames)
        else:
            assert grid is not None
            dtype = self.input_norm.weight.dtype
            neighborhood = self.rotary.neighborhood(grid, frames, self.head_dim, x_BND.device, dtype)
            x_BND = x_BND + self._periodic_positions(grid, self.rotary.period).repeat(len(frames), 1)
        span = tokens_per_frame if self.causal else x_BND.shape[1]
        x_BND = self.input_norm(x_BND)
        for index, block in enumerate(self.blocks):
            cache = caches[index] if caches else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # A block uses no random numbers, so there is no generator state to save.
                x_BND = checkpoint(
                    block, x_BND, span, None, neighborhood, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BND = block(x_BND, span, cache, neighborhood)
        return cast(Tensor, self.output_norm(x_BND))

    def _learned_positions(self, frames: range) -> Tensor:
        """Return the position embeddings (N, D) of consecutive frames."""
        position_TSD = self.spatial_position.expand(len(frames), -1, -1)
        if self.temporal_position is not None:
            position_TSD = position_TSD + self.temporal_position[frames.start : frames.stop, None]
        return position_TSD.flatten(0, 1)

    def _periodic_positions(self, grid: tuple[int, int], period: int) -> Tensor:
        """Return the position embeddings (N, D) of a grid, which repeat in both directions."""
        rows, columns = (torch.arange(length, device=self.spatial_position.device) % period for length in grid)
        return self.spatial_position[(rows[:, None] * period + columns).flatten()]

    def new_caches(self, tokens_per_frame: int) -> list[KeyValueCache]:
        """Create empty caches for a clip of up to `frames` frames that arrives in parts; use without gradients."""
        return [KeyValueCache(self.frames * tokens_per_frame) for _ in self.blocks]

    def _init_weights(self) -> None:
        nn.init.normal_(self.spatial_position, std=0.02)
        if self.temporal_position is not None:
            nn.init.zeros_(self.temporal_position)
        init_weights(self.blocks)
