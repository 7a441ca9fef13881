"""Pre-LN vision transformer: the body that the tokenizer's encoder and decoder share.

Shape suffixes: B clips, T frames, S tokens of one frame, N = T·S tokens of a clip (time slowest, rows before columns),
D width, H attention heads, E width of one head.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsq_ray import config


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases; query, key and value come from one projection, in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, mask_NN: Tensor | None) -> Tensor:
        """Attends from each token to the tokens where its row of `mask_NN` is True; None is everywhere."""
        q_BHNE, k_BHNE, v_BHNE = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, attn_mask=mask_NN)
        return cast(Tensor, self.out(y_BHNE.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the unit to compile, checkpoint or shard."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BND: Tensor, mask_NN: Tensor | None) -> Tensor:
        """Same shape out as in."""
        x_BND = x_BND + self.attention(self.attention_norm(x_BND), mask_NN)
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
        self, sizes: config.Transformer, frame_tokens: int, frames: int, causal: bool, gradient_checkpointing: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        self.gradient_checkpointing = gradient_checkpointing
        self.spatial_position = nn.Parameter(torch.empty(frame_tokens, sizes.width))
        self.temporal_position = nn.Parameter(torch.empty(frames, sizes.width)) if frames > 1 else None
        self.input_norm = nn.LayerNorm(sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads, sizes.mlp_ratio) for _ in range(sizes.layers))
        self.output_norm = nn.LayerNorm(sizes.width)
        self._initialise()

    def forward(self, x_BND: Tensor) -> Tensor:
        """Same shape out as in; N is 1 to `frames` times `frame_tokens`."""
        frame_tokens, _ = self.spatial_position.shape
        frames = x_BND.shape[1] // frame_tokens
        position_TSD = self.spatial_position.expand(frames, -1, -1)
        if self.temporal_position is not None:
            position_TSD = position_TSD + self.temporal_position[:frames, None]
        mask_NN = block_causal_mask(frames, frame_tokens, x_BND.device) if self.causal and frames > 1 else None
        x_BND = self.input_norm(x_BND + position_TSD.flatten(0, 1))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no generator state to keep.
                x_BND = checkpoint(block, x_BND, mask_NN, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BND = block(x_BND, mask_NN)
        return cast(Tensor, self.output_norm(x_BND))

    def _initialise(self) -> None:
        nn.init.normal_(self.spatial_position, std=0.02)
        if self.temporal_position is not None:
            nn.init.zeros_(self.temporal_position)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


def block_causal_mask(frames: int, frame_tokens: int, device: torch.device) -> Tensor:
    """Boolean (N, N), True where the query of the row may attend: tokens of its own frame and of earlier frames."""
    frame_N = torch.arange(frames, device=device).repeat_interleave(frame_tokens)
    return frame_N[:, None] >= frame_N[None, :]
