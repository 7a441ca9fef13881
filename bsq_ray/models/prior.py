r"""Autoregressive prior: the exact probability of every bit of an image's tokens (paper section 4.2).

    start, token 1 … token N-1 ─embed─▶ causal blocks ─▶ features of token 1 … N
    features, earlier sub-tokens of the token ─▶ tree of each sub-token: logits of its 2^k - 1 nodes

Tokens are in raster order within a frame, and frames in time order. A sub-token of k bits is a path down a binary tree,
least significant bit first. The logit of a node gives the probability that its bit is 1. For k = 2:

             node 0               bit 1 of the sub-token
           0 /    \ 1
        node 1    node 2          bit 2
        0 / \ 1   0 / \ 1
        0    2     1    3         value of the sub-token

The training loss sums the cross-entropy of the nodes on the path, which is the code length of the sub-token.

With the order "plane", the sequence is sub-token 1 of all tokens, then sub-token 2 of all tokens, and so on. Its input
at a position is the sub-token before it in this order, and the earlier sub-tokens of its own token.

Shape suffixes: B images, N tokens, S sub-tokens of a token, M = S·N positions in the order "plane", K nodes of a tree,
k bits of a sub-token, D width, H heads, E width of one head, L bits of a token.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.models.layers.attention import attention, causal_attention, merge_heads, split_heads
from bsq_ray.models.layers.kv_cache import KeyValueCache
from bsq_ray.models.layers.mlp import build_mlp, init_weights
from bsq_ray.models.pretrained import PretrainedModel


class CausalBlock(nn.Module):
    """Pre-LN block: x + attention(norm(x)), then x + mlp(norm(x)). A token attends to itself and to earlier tokens."""

    def __init__(self, model_config: config.TokenModelConfig) -> None:
        super().__init__()
        width = model_config.width
        self.heads = model_config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = build_mlp(width, model_config.mlp_ratio)
        self.dropout = nn.Dropout(model_config.dropout)

    def forward(self, x_BND: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D); with a cache, x is the single token after the cached ones."""
        q_BHNE, k_BHNE, v_BHNE = split_heads(self.qkv(self.attention_norm(x_BND)), self.heads)
        if cache is None:
            y_BHNE = causal_attention(q_BHNE, k_BHNE, v_BHNE)
        else:
            y_BHNE = attention(q_BHNE, *cache.extend(k_BHNE, v_BHNE))
        x_BND = x_BND + self.dropout(self.out(merge_heads(y_BHNE)))
        return x_BND + cast(Tensor, self.dropout(self.mlp(self.mlp_norm(x_BND))))


class Prior(PretrainedModel[config.PriorModelConfig]):
    """Predicts the bits of an image's tokens from earlier bits."""

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
        # Embeddings of the earlier sub-tokens of a token, added to its features.
        self.earlier = nn.Embedding(max(1, model_config.num_sub_tokens - 1) * num_values, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.trees = nn.ModuleList(nn.Linear(width, num_values - 1) for _ in range(model_config.num_sub_tokens))
        # Embedding of the index of a sub-token, in the order "plane".
        self.plane: nn.Parameter | None = None
        if model_config.order == "plane":
            self.plane = nn.Parameter(torch.empty(model_config.num_sub_tokens, width))
        init_weights(self)
        for parameter in (self.start, self.position, self.plane):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, sub_tokens_BNS: Tensor) -> Tensor:
        """Return fp32 logits (B, N, S, K) of all nodes of every token, in one forward pass.

        N may be less than the model's number of tokens, for example the tokens of the first frames of a clip. In the
        order "plane" S may be less, too, and logits of sub-tokens then depend on N.
        """
        num_sub_tokens = sub_tokens_BNS.shape[-1]
        x_BND = self._token_inputs(sub_tokens_BNS) if self.plane is None else self._plane_inputs(sub_tokens_BNS)
        for block in self.blocks:
            x_BND = block(x_BND)
        h_BND = self.output_norm(x_BND)
        features = [h_BND] * num_sub_tokens if self.plane is None else h_BND.chunk(num_sub_tokens, 1)
        return torch.stack([self.node_logits(h_BND, sub_tokens_BNS[..., :s]) for s, h_BND in enumerate(features)], 2)

    def node_logits(self, h_BND: Tensor, earlier_BNs: Tensor) -> Tensor:
        """Return fp32 logits (B, N, K) of the nodes of sub-token s, given the s earlier sub-tokens of the token."""
        sub_token_index = earlier_BNs.shape[-1]
        if sub_token_index:
            h_BND = h_BND + self.earlier(earlier_BNs + self._row_offsets(earlier_BNs)).sum(-2)
        return cast(Tensor, self.trees[sub_token_index](self.head(h_BND))).float()

    def start_decoding(self, batch_size: int, num_tokens: int | None = None) -> IncrementalDecoder:
        """Return a decoder for a batch, token by token with a KV cache.

        Args:
            batch_size: number of images.
            num_tokens: maximum number of tokens to decode; None stands for all tokens of the model.
        """
        assert self.plane is None
        return IncrementalDecoder(self, batch_size, num_tokens or self.config.num_tokens)

    def start_plane_decoding(self, batch_size: int, num_tokens: int | None = None) -> PlaneDecoder:
        """Return a decoder for a batch in the order "plane", sub-token by sub-token with a KV cache.

        Args:
            batch_size: number of images.
            num_tokens: number of tokens of an image; None stands for all tokens of the model.
        """
        return PlaneDecoder(self, batch_size, num_tokens or self.config.num_tokens)

    def _token_inputs(self, sub_tokens_BNS: Tensor) -> Tensor:
        x_BND = torch.cat([self.start.expand(len(sub_tokens_BNS), 1, -1), self._embed(sub_tokens_BNS[:, :-1])], 1)
        return x_BND + self.position[: x_BND.shape[1]]

    def _plane_inputs(self, sub_tokens_BNS: Tensor) -> Tensor:
        """Return the inputs (B, M, D): the previous sub-token, and the earlier ones of the same token."""
        assert self.plane is not None
        num_tokens, num_planes = sub_tokens_BNS.shape[1:]
        rows_BNS = sub_tokens_BNS + self._row_offsets(sub_tokens_BNS)
        previous_BMD = self.embedding(rows_BNS.transpose(1, 2).flatten(1)[:, :-1])
        x_BMD = torch.cat([self.start.expand(len(sub_tokens_BNS), 1, -1), previous_BMD], 1)
        x_BMD = x_BMD + (self.position[:num_tokens] + self.plane[:num_planes, None]).flatten(0, 1)
        if num_planes == 1:
            return x_BMD
        earlier_BNSD = self.earlier(rows_BNS[..., :-1]).cumsum(2)
        own_BMD = earlier_BNSD.transpose(1, 2).flatten(1, 2)
        return torch.cat([x_BMD[:, :num_tokens], x_BMD[:, num_tokens:] + own_BMD], 1)

    def _embed(self, sub_tokens_BNS: Tensor) -> Tensor:
        return cast(Tensor, self.embedding(sub_tokens_BNS + self._row_offsets(sub_tokens_BNS)).sum(2))

    def _row_offsets(self, sub_tokens_BNS: Tensor) -> Tensor:
        """Return the first row of each sub-token in the tables."""
        return torch.arange(sub_tokens_BNS.shape[-1], device=sub_tokens_BNS.device) * 2**self.config.sub_bits


class IncrementalDecoder:
    """Decodes token by token with a KV cache.

    For each token call `next_features`, then `Prior.node_logits` for each sub-token, then `push`.
    """

    def __init__(self, prior: Prior, batch_size: int, num_tokens: int) -> None:
        self.prior = prior
        self._caches = [KeyValueCache(num_tokens) for _ in prior.blocks]
        self._next_B1D = prior.start.expand(batch_size, 1, -1)
        self._position = 0

    def next_features(self) -> Tensor:
        """Compute the features (B, 1, D) of the next token."""
        x_B1D = self._next_B1D + self.prior.position[self._position]
        for block, cache in zip(self.prior.blocks, self._caches, strict=True):
            x_B1D = block(x_B1D, cache)
        return cast(Tensor, self.prior.output_norm(x_B1D))

    def push(self, sub_tokens_BS: Tensor) -> None:
        """Append the decoded token, the input of the next `next_features`."""
        self._position += 1
        self._next_B1D = self.prior._embed(sub_tokens_BS[:, None])


class PlaneDecoder:
    """Decodes sub-token by sub-token in the order "plane", with a KV cache.

    For sub-token 1 of all tokens, then sub-token 2 of all tokens, and so on: call `next_features`, then
    `Prior.node_logits`, then `push`.
    """

    def __init__(self, prior: Prior, batch_size: int, num_tokens: int) -> None:
        assert prior.plane is not None
        self.prior, self._num_tokens = prior, num_tokens
        self._plane: Tensor = prior.plane
        self._caches = [KeyValueCache(num_tokens * prior.config.num_sub_tokens) for _ in prior.blocks]
        self._previous_B1D = prior.start.expand(batch_size, 1, -1)
        self._step = 0

    def next_features(self, earlier_B1s: Tensor) -> Tensor:
        """Compute the features (B, 1, D) of the next sub-token, given the earlier sub-tokens of its token."""
        plane, position = divmod(self._step, self._num_tokens)
        assert earlier_B1s.shape[-1] == plane
        x_B1D = self._previous_B1D + (self.prior.position[position] + self._plane[plane])
        if plane:
            x_B1D = x_B1D + self.prior.earlier(earlier_B1s + self.prior._row_offsets(earlier_B1s)).sum(-2)
        for block, cache in zip(self.prior.blocks, self._caches, strict=True):
            x_B1D = block(x_B1D, cache)
        return cast(Tensor, self.prior.output_norm(x_B1D))

    def push(self, sub_tokens_B: Tensor) -> None:
        """Append the decoded sub-token, the input of the next `next_features`."""
        first_row = self._step // self._num_tokens * 2**self.prior.config.sub_bits
        self._previous_B1D = self.prior.embedding(sub_tokens_B[:, None] + first_row)
        self._step += 1


def binary_tree_nodes(sub_tokens: Tensor, sub_bits: int) -> tuple[Tensor, Tensor]:
    """Return the nodes on the path to each sub-token and the bit taken at each node, both (…, k).

    Node 0 is the root. From node i, bit b leads to node 2 i + 1 + b. The least significant bit is first.
    """
    bits = sub_tokens[..., None] >> torch.arange(sub_bits, device=sub_tokens.device) & 1
    nodes = torch.zeros_like(bits)
    for depth in range(1, sub_bits):
        nodes[..., depth] = 2 * nodes[..., depth - 1] + 1 + bits[..., depth - 1]
    return nodes, bits


def code_length(logits_BNSK: Tensor, sub_tokens_BNS: Tensor, sub_bits: int) -> Tensor:
    """Return the code length (B, N, S) of the sub-tokens in nats, summed over the nodes on their paths."""
    nodes_BNSk, bits_BNSk = binary_tree_nodes(sub_tokens_BNS, sub_bits)
    path_logits_BNSk = logits_BNSK.gather(-1, nodes_BNSk)
    targets_BNSk = bits_BNSk.to(path_logits_BNSk.dtype)
    return F.binary_cross_entropy_with_logits(path_logits_BNSk, targets_BNSk, reduction="none").sum(-1)
