"""Autoregressive prior: the exact probability of every bit of an image's tokens (paper section 4.2).

    start, token 1 … token N-1 ─embedded─▶ causal blocks ─▶ features of token 1 … N
    features, earlier sub-tokens of the token ─▶ tree of each sub-token: logits of its 2^k - 1 nodes

Tokens are in raster order inside a frame, frames in time order. A sub-token of k bits is a walk down a binary tree, its
least significant bit first: at each node one logit says how likely a 1 is. The training loss is the sum over the nodes
on the path, which is exactly what coding them costs.

Shape suffixes: B images, N tokens, S sub-tokens of a token, K nodes of a tree, k bits of a sub-token, D width, H heads,
E width of one head, L bits of a token.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.models.layers.attention import attention, causal_attention
from bsq_ray.models.pretrained import PretrainedModel


class CausalBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), where a token attends to itself and what is before it."""

    def __init__(self, model_config: config.TokenModelConfig) -> None:
        super().__init__()
        width, hidden_dim = model_config.width, int(model_config.width * model_config.mlp_ratio)
        self.heads = model_config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, width))
        self.dropout = nn.Dropout(model_config.dropout)

    def forward(self, x_BND: Tensor, cache: tuple[Tensor, Tensor] | None = None, position: int = 0) -> Tensor:
        """Same shape out as in; with a cache of keys and values (B, H, N, E), x is the one token at `place`."""
        q_BHNE, k_BHNE, v_BHNE = (
            self.qkv(self.attention_norm(x_BND)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        )
        if cache is None:
            y_BHNE = causal_attention(q_BHNE, k_BHNE, v_BHNE)
        else:
            keys, values = cache
            keys[:, :, position : position + 1], values[:, :, position : position + 1] = k_BHNE, v_BHNE
            y_BHNE = attention(q_BHNE, keys[:, :, : position + 1], values[:, :, : position + 1])
        x_BND = x_BND + self.dropout(self.out(y_BHNE.transpose(1, 2).flatten(2)))
        return x_BND + cast(Tensor, self.dropout(self.mlp(self.mlp_norm(x_BND))))


class Prior(PretrainedModel[config.PriorModelConfig]):
    """Probabilities of the bits of an image's tokens, given those before them."""

    run_config_class = config.PriorConfig

    def __init__(self, model_config: config.PriorModelConfig) -> None:
        super().__init__(model_config)
        width, num_values = model_config.width, 2**model_config.sub_bits
        # One table for all sub-tokens: value v of sub-token s is row s · 2^k + v.
        self.embedding = nn.Embedding(model_config.num_sub_tokens * num_values, width)
        self.start = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(model_config.num_tokens, width))
        self.blocks = nn.ModuleList(CausalBlock(model_config) for _ in range(model_config.layers))
        self.output_norm = nn.LayerNorm(width)
        # What a token's earlier sub-tokens add to its features.
        self.earlier = nn.Embedding(max(1, model_config.num_sub_tokens - 1) * num_values, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.trees = nn.ModuleList(nn.Linear(width, num_values - 1) for _ in range(model_config.num_sub_tokens))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for parameter in (self.start, self.position):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, sub_tokens_BNS: Tensor) -> Tensor:
        """Logits of all nodes (B, N, S, K), fp32, of every token given those before it (the parallel pass).

        N may be less than the model's: the first tokens, such as those of a clip's first frames.
        """
        x_BND = torch.cat([self.start.expand(len(sub_tokens_BNS), 1, -1), self._embed(sub_tokens_BNS[:, :-1])], 1)
        x_BND = x_BND + self.position[: x_BND.shape[1]]
        for block in self.blocks:
            x_BND = block(x_BND)
        h_BND = self.output_norm(x_BND)
        return torch.stack(
            [self.node_logits(h_BND, sub_tokens_BNS[..., :s]) for s in range(self.config.num_sub_tokens)], 2
        )

    def node_logits(self, h_BND: Tensor, earlier_BNs: Tensor) -> Tensor:
        """Logits (B, N, K) of the next sub-token's nodes, given the s sub-tokens of the same token before it."""
        sub_token_index = earlier_BNs.shape[-1]
        if sub_token_index:
            row_offsets_s = torch.arange(sub_token_index, device=earlier_BNs.device) * 2**self.config.sub_bits
            h_BND = h_BND + self.earlier(earlier_BNs + row_offsets_s).sum(-2)
        return cast(Tensor, self.trees[sub_token_index](self.head(h_BND))).float()

    def start_decoding(self, batch_size: int, num_tokens: int | None = None) -> IncrementalDecoder:
        """Step-by-step decoding of a batch of images, with cached keys and values; of the first `tokens`, or of all."""
        return IncrementalDecoder(self, batch_size, num_tokens or self.config.num_tokens)

    def _embed(self, sub_tokens_BNS: Tensor) -> Tensor:
        row_offsets_S = torch.arange(self.config.num_sub_tokens, device=sub_tokens_BNS.device) * 2**self.config.sub_bits
        return cast(Tensor, self.embedding(sub_tokens_BNS + row_offsets_S).sum(2))


class IncrementalDecoder:
    """One token after the other: `features`, then `node_logits` and a value for each sub-token, then `push`."""

    def __init__(self, prior: Prior, batch_size: int, num_tokens: int) -> None:
        self.prior = prior
        model_config, like = prior.config, prior.start
        shape = (batch_size, model_config.heads, num_tokens, model_config.width // model_config.heads)
        self._caches = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in prior.blocks]
        self._next_B1D = like.expand(batch_size, 1, -1)
        self._position = 0

    def next_features(self) -> Tensor:
        """Features (B, 1, D) of the next token."""
        x_B1D = self._next_B1D + self.prior.position[self._position]
        for block, cache in zip(self.prior.blocks, self._caches, strict=True):
            x_B1D = block(x_B1D, cache, self._position)
        return cast(Tensor, self.prior.output_norm(x_B1D))

    def push(self, sub_tokens_BS: Tensor) -> None:
        """The token that was decoded."""
        self._position += 1
        self._next_B1D = self.prior._embed(sub_tokens_BS[:, None])


def binary_tree_nodes(sub_tokens: Tensor, sub_bits: int) -> tuple[Tensor, Tensor]:
    """Nodes on the way to each value and the bits taken there, both (…, k); node 0 is the root.

    From node i a bit b leads to node 2 i + 1 + b; the least significant bit is taken first.
    """
    bits = sub_tokens[..., None] >> torch.arange(sub_bits, device=sub_tokens.device) & 1
    nodes = torch.zeros_like(bits)
    for depth in range(1, sub_bits):
        nodes[..., depth] = 2 * nodes[..., depth - 1] + 1 + bits[..., depth - 1]
    return nodes, bits


def code_length(logits_BNSK: Tensor, sub_tokens_BNS: Tensor, sub_bits: int) -> Tensor:
    """What the sub-tokens cost in nats, (B, N, S): the sum over the nodes on their paths."""
    nodes, bits = binary_tree_nodes(sub_tokens_BNS, sub_bits)
    chosen_logits = logits_BNSK.gather(-1, nodes)
    return F.binary_cross_entropy_with_logits(chosen_logits, bits.to(chosen_logits.dtype), reduction="none").sum(-1)
