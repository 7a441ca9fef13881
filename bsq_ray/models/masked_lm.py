"""Masked language model: a bidirectional post-LN Transformer that fills in masked tokens (MaskGIT; paper section 4.1).

    sub-tokens ─embed and sum─▶ token ┐
    class ─embed─▶ first position ────┴▶ blocks ─▶ head ─▶ logits of every sub-token

A token of L bits is split into S sub-tokens of L / S bits, so no table has 2^L rows.

Shape suffixes: B images, N tokens, S sub-tokens of a token, V values of a sub-token, C classes and the null class,
D width, H heads, E width of one head, L bits of a token.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.models.layers.attention import attention, merge_heads, split_heads
from bsq_ray.models.layers.mlp import build_mlp, init_weights
from bsq_ray.models.pretrained import PretrainedModel
from bsq_ray.models.quantizers.bits import bits_to_integers, integers_to_bits


class PostNormBlock(nn.Module):
    """Post-LN block: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, model_config: config.TokenModelConfig) -> None:
        super().__init__()
        width = model_config.width
        self.heads = model_config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = build_mlp(width, model_config.mlp_ratio)
        self.mlp_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(model_config.dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        y_BHNE = attention(*split_heads(self.qkv(x_BND), self.heads))
        x_BND = self.attention_norm(x_BND + self.dropout(self.out(merge_heads(y_BHNE))))
        return cast(Tensor, self.mlp_norm(x_BND + self.dropout(self.mlp(x_BND))))


class MaskedLM(PretrainedModel[config.MaskedLMModelConfig]):
    """Predicts every sub-token of an image from its class and the sub-tokens that are not masked.

    Attributes:
        mask_token: value of a masked sub-token (V).
        null_class: index of the class of unconditional generation (C - 1).
    """

    run_config_class = config.MaskedLMConfig

    def __init__(self, model_config: config.MaskedLMModelConfig) -> None:
        super().__init__(model_config)
        self.mask_token = 2**model_config.sub_bits
        self.null_class = model_config.num_classes
        width = model_config.width
        # One table for all sub-tokens: sub-token s has rows s · (V + 1) to s · (V + 1) + V, the last one for the mask.
        self.embedding = nn.Embedding(model_config.num_sub_tokens * (self.mask_token + 1), width)
        self.classes = nn.Linear(model_config.num_classes + 1, width, bias=False)
        self.position = nn.Parameter(torch.empty(model_config.num_tokens + 1, width))
        self.input_norm = nn.LayerNorm(width)
        self.input_dropout = nn.Dropout(model_config.dropout)
        self.blocks = nn.ModuleList(PostNormBlock(model_config) for _ in range(model_config.layers))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(model_config.num_sub_tokens, self.mask_token))
        init_weights(self)
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, sub_tokens_BNS: Tensor, classes_BC: Tensor) -> Tensor:
        """Return fp32 logits (B, N, S, V).

        Args:
            sub_tokens_BNS: int64 values 0 to V - 1, or `mask_token`.
            classes_BC: weights of the classes, see `class_weights`; mixtures interpolate between classes.
        """
        row_offsets = torch.arange(self.config.num_sub_tokens, device=sub_tokens_BNS.device) * (self.mask_token + 1)
        x_BND = self.embedding(sub_tokens_BNS + row_offsets).sum(2)
        class_B1D = self.classes(classes_BC)[:, None]
        x_BND = torch.cat([class_B1D.to(x_BND.dtype), x_BND], 1) + self.position
        x_BND = self.input_dropout(self.input_norm(x_BND))
        for block in self.blocks:
            x_BND = block(x_BND)
        h_BND = self.head(x_BND[:, 1:])
        table_SVD = self.embedding.weight.unflatten(0, (self.config.num_sub_tokens, -1))[:, : self.mask_token]
        logits_BNSV = torch.einsum("bnd,svd->bnsv", h_BND, table_SVD.to(h_BND.dtype))
        return logits_BNSV.float() + self.bias

    def class_weights(self, labels_B: Tensor) -> Tensor:
        """Convert class indices (B,) to one-hot weights (B, C); `null_class` is allowed.

        Raises:
            ValueError: a class index is out of range.
        """
        if len(labels_B) and not 0 <= int(labels_B.min()) <= int(labels_B.max()) <= self.null_class:
            raise ValueError(
                f"the model has classes 0 to {self.null_class - 1}, not {int(labels_B.min())} to {int(labels_B.max())}"
            )
        return F.one_hot(labels_B.long(), self.null_class + 1).float()

    def split_bits(self, bits_BNL: Tensor) -> Tensor:
        """Split the bits (B, N, L) of tokens into sub-tokens (B, N, S)."""
        return bits_to_integers(bits_BNL, self.config.sub_bits)

    def join_bits(self, sub_tokens_BNS: Tensor) -> Tensor:
        """Invert `split_bits`; masked sub-tokens become zeros."""
        return integers_to_bits(sub_tokens_BNS % self.mask_token, self.config.sub_bits)


def masked_cross_entropy(
    logits_BNSV: Tensor,
    sub_tokens_BNS: Tensor,
    masked_BNS: Tensor,
    label_smoothing: float,
    num_masked: Tensor | None = None,
) -> Tensor:
    """Return the mean cross entropy of the masked sub-tokens in nats, scalar.

    Args:
        num_masked: number of masked sub-tokens that the sum is divided by; None: those of `masked_BNS`.
    """
    masked = masked_BNS.flatten()
    logits_PV = logits_BNSV.flatten(0, 2)[masked]
    targets_P = sub_tokens_BNS.flatten()[masked]
    total = F.cross_entropy(logits_PV, targets_P, label_smoothing=label_smoothing, reduction="sum")
    return total / (masked.sum() if num_masked is None else num_masked)
