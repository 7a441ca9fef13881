"""Parameters, operations and saved activations of masked language models and priors, by formula.

Shape letters: N tokens of a sample, S sub-tokens of a token, V values of a sub-token, k its bits, C classes and "any",
D width, h hidden width of a block's MLP; e is the size of a matrix product's operand, see `activations`.
"""

from __future__ import annotations

from math import pi

from bsq_ray import config
from bsq_ray.planning.activations import block_activation_bytes
from bsq_ray.planning.flops import blocks_flops
from bsq_ray.planning.layer_costs import num_block_parameters

# Mean fraction of masked tokens of the cosine schedule.
_MEAN_MASKED_FRACTION = 2 / pi


def num_token_model_parameters(model: config.TokenModelConfig) -> int:
    """Return the parameters of all layers.

    Masked language model: table S (V + 1) D, classes C D, positions (N + 1) D, a norm, and a bias for every value.
    Prior: tables S V D and (S - 1) V D, positions N D and a start, a norm, S trees of V - 1 nodes, and in the order
    "plane" S D. Both: blocks, and a head of D² + D and a norm.
    """
    width, values, sub_tokens = model.width, 2**model.sub_bits, model.num_sub_tokens
    shared = num_block_parameters(model.transformer) + 2 * width + width**2 + 3 * width + (model.num_tokens + 1) * width
    if isinstance(model, config.MaskedLMModelConfig):
        return shared + sub_tokens * ((values + 1) * width + values) + (model.num_classes + 1) * width
    tables = (sub_tokens + max(1, sub_tokens - 1)) * values * width
    tables += sub_tokens * width if _is_plane_order(model) else 0
    return shared + tables + sub_tokens * (width + 1) * (values - 1)


def token_model_forward_flops(model: config.TokenModelConfig) -> int:
    """Return the operations of a forward pass for one sample.

    The head costs 2 D² per token and each sub-token's logits 2 D V. The prior runs its head for every sub-token, and
    its blocks on S N positions in the order "plane". Scores that the causal mask removes are counted.
    """
    width, tokens, sub_tokens = model.width, model.num_tokens, model.num_sub_tokens
    if isinstance(model, config.MaskedLMModelConfig):
        blocks = blocks_flops(model.transformer, tokens + 1, (tokens + 1) ** 2) + _class_flops(model)
        return blocks + 2 * tokens * width * (width + sub_tokens * 2**model.sub_bits)
    nodes = 2**model.sub_bits - 1
    length = _sequence_length(model)
    blocks = blocks_flops(model.transformer, length, length**2)
    return blocks + 2 * tokens * sub_tokens * width * (width + nodes)


def token_model_step_flops(model: config.TokenModelConfig) -> int:
    """Return the operations of a training step for one sample: three forward passes; classes need no gradient."""
    return 3 * token_model_forward_flops(model) - (
        _class_flops(model) if isinstance(model, config.MaskedLMModelConfig) else 0
    )


def token_model_activation_bytes(model: config.TokenModelConfig, half: bool) -> float:
    """Return the bytes that the forward pass saves for one sample.

    Blocks as in the tokenizer; dropout on GPUs saves a mask of one byte for each of 2 D values per block. Masked
    language model: the first norm 4 D, the head 2 e D + 4 D and the input of the output product e D, logits at masked
    positions 4 S V. Prior: the last norm 4 D, and for each sub-token the head 2 e D + 4 D, the tree's
    input e D, its logits 4 (V - 1), and for each of its k bits 16: logit and bit in fp32, node as an integer.
    """
    operand_bytes, width = (2 if half else 4), model.width
    per_token: float = model.layers * (
        block_activation_bytes(model.transformer, half) + (2 * width if model.dropout else 0)
    )
    # The norm outside the blocks with its statistics, and the indices of embeddings.
    per_token += 4 * width + 8 + 8 * model.num_sub_tokens
    head = 3 * operand_bytes * width + 4 * width + 8
    if isinstance(model, config.MaskedLMModelConfig):
        logits = 4 * _MEAN_MASKED_FRACTION * model.num_sub_tokens * 2**model.sub_bits
        per_token += width if model.dropout else 0
        classes = (operand_bytes + 4 * half) * (model.num_classes + 1)
        return (model.num_tokens + 1) * per_token + model.num_tokens * (head + logits) + classes
    nodes = 4 * (2**model.sub_bits - 1)
    heads = model.num_tokens * model.num_sub_tokens * (head + nodes + 16 * model.sub_bits)
    return _sequence_length(model) * per_token + heads


def _is_plane_order(model: config.TokenModelConfig) -> bool:
    return isinstance(model, config.PriorModelConfig) and model.order == "plane"


def _sequence_length(model: config.TokenModelConfig) -> int:
    return model.sequence_length if isinstance(model, config.PriorModelConfig) else model.num_tokens


def _class_flops(model: config.MaskedLMModelConfig) -> int:
    return 2 * (model.num_classes + 1) * model.width
