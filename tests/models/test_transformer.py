"""The transformer body: masking, checkpointing, compiling."""

import pytest
import torch
import torch.nn.functional as F

from bsq_ray import config
from bsq_ray.models.layers.attention import span_attention
from bsq_ray.models.layers.transformer import VisionTransformer


def small_transformer(frames=1, causal=True, gradient_checkpointing=False):
    torch.manual_seed(0)
    sizes = config.TransformerConfig(width=32, layers=2, heads=4)
    return VisionTransformer(sizes, 4, frames, causal, gradient_checkpointing)


def dense_attention(q, k, v, span):
    """Compute the same as `span_attention`, with an explicit mask."""
    earlier = k.shape[2] - q.shape[2]
    frame_M = torch.arange(k.shape[2]) // span
    mask_NM = frame_M[earlier:, None] >= frame_M[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NM).transpose(1, 2)


@pytest.mark.parametrize("earlier", [0, 8])
@pytest.mark.parametrize("span", [4, 12])
def test_span_attention_matches_block_causal_mask(span, earlier):
    """Frame-by-frame attention matches attention with a block-causal mask, in values and gradients."""
    earlier = earlier if span == 4 else 0
    torch.manual_seed(0)
    ours = [torch.randn(2, 3, length, 8, requires_grad=True) for length in (12, earlier + 12, earlier + 12)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    weight = torch.randn(2, 12, 3, 8)
    y, expected = span_attention(*ours, (span, span)), dense_attention(*theirs, span)
    torch.testing.assert_close(y, expected)
    for result in (y, expected):
        (result * weight).sum().backward()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_span_attention_computes_only_allowed_pairs_without_mask(monkeypatch):
    pairs = []
    original = F.scaled_dot_product_attention

    def counting_attention(q, k, v, **options):
        assert not options
        pairs.append(q.shape[2] * k.shape[2])
        return original(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting_attention)
    small_transformer(frames=4)(torch.randn(1, 16, 32))
    # Two layers; a frame of 4 tokens sees 4, 8, 12 or 16.
    assert sum(pairs) == 2 * 4 * (4 + 8 + 12 + 16)
    pairs.clear()
    small_transformer(frames=4, causal=False)(torch.randn(1, 16, 32))
    assert sum(pairs) == 2 * 16 * 16


@pytest.mark.parametrize("pieces", [[1, 1, 1], [2, 1], [1, 2], [3]])
def test_transformer_with_kv_cache_matches_single_pass(pieces):
    """With key-value caches, a clip passed in chunks gives the output of one pass."""
    transformer = small_transformer(3)
    with torch.no_grad():
        transformer.temporal_position.normal_()
        x = torch.randn(2, 12, 32)
        caches = transformer.new_caches(transformer.tokens_per_frame)
        parts = [transformer(part, caches) for part in x.split([4 * frames for frames in pieces], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), transformer(x), rtol=1e-5, atol=1e-5)
    assert [cache.length for cache in caches] == [12, 12]


def test_transformer_causal_flag_controls_earlier_frames():
    """Changing a frame leaves earlier frames unchanged in a causal transformer and changes them otherwise."""
    x = torch.randn(2, 12, 32)
    changed = x.clone()
    changed[:, 4:8] = torch.randn(2, 4, 32)
    causal, free = small_transformer(3), small_transformer(3, causal=False)
    assert torch.equal(causal(x)[:, :4], causal(changed)[:, :4])
    assert not torch.equal(causal(x)[:, 8:], causal(changed)[:, 8:])
    assert not torch.equal(free(x)[:, :4], free(changed)[:, :4])


def test_causal_transformer_prefix_matches_full_clip():
    """In a causal transformer a shorter clip gives the first frames of a longer one."""
    transformer = small_transformer(3)
    x = torch.randn(2, 12, 32)
    torch.testing.assert_close(transformer(x[:, :4]), transformer(x)[:, :4])


def test_transformer_initial_temporal_position_is_zero():
    """Temporal positions start at zero, so a new model gives equal frames equal outputs."""
    transformer = small_transformer(3, causal=False)
    x = torch.randn(1, 4, 32).repeat(1, 3, 1)
    frames = transformer(x).unflatten(1, (3, 4))
    torch.testing.assert_close(frames[:, 0], frames[:, 2])
    assert transformer.temporal_position.abs().max() == 0
    assert small_transformer().temporal_position is None


def test_gradient_checkpointing_same_gradients_less_memory():
    """Gradient checkpointing gives the same gradients and saves under a fifth of the activations."""
    x = torch.randn(2, 12, 32)
    saved_elements = {}
    gradients = {}
    for checkpointing in (False, True):
        transformer = small_transformer(3, gradient_checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            y = transformer(x)
        saved_elements[checkpointing] = sum(sizes)
        y.square().mean().backward()
        gradients[checkpointing] = [p.grad for p in transformer.parameters()]
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert saved_elements[True] < 0.2 * saved_elements[False]


@pytest.mark.integration
def test_compiled_transformer_matches_eager():
    """Compiled blocks give the values and gradients of eager ones."""
    x = torch.randn(2, 12, 32)
    results = []
    for compiled in (False, True):
        transformer = small_transformer(3)
        if compiled:
            for block in transformer.blocks:
                block.compile(backend="aot_eager")
        y = transformer(x)
        y.square().mean().backward()
        results.append([y, *(parameter.grad for parameter in transformer.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)
