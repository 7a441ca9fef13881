"""Attention is the same function in both of its forms."""

import pytest
import torch
import torch.nn.functional as F

from bsq_ray.models.layers.attention import attention, causal_attention

IMPLEMENTATIONS = pytest.mark.parametrize(("form", "causal"), [(attention, False), (causal_attention, True)])


def random_qkv(tokens, dtype):
    torch.manual_seed(0)
    return [torch.randn(2, 3, tokens, 16).to(dtype).requires_grad_() for _ in range(3)]


def fused_calls(monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *tensors, **how: calls.append(1) or original(*tensors, **how)
    )
    return calls


@IMPLEMENTATIONS
def test_attention_eager_bf16_matches_fp64_reference(form, causal, monkeypatch):
    """Eager attention, used for bf16 training on a CPU, matches the values and gradients of fp64 attention."""
    ours = random_qkv(40, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    expected = F.scaled_dot_product_attention(*exact, is_causal=causal)
    calls = fused_calls(monkeypatch)
    y = form(*ours)
    assert not calls
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)
    weight = torch.randn_like(expected)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for left, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(left.grad.double(), right.grad, rtol=0.05, atol=0.05)


@IMPLEMENTATIONS
def test_attention_fp32_no_grad_or_many_keys_uses_fused_kernel(form, causal, monkeypatch):
    """Inputs in fp32, without gradients, or with more than 512 keys use PyTorch's fused attention."""
    calls = fused_calls(monkeypatch)
    tensors = random_qkv(8, torch.float32)
    torch.testing.assert_close(form(*tensors), F.scaled_dot_product_attention(*tensors, is_causal=causal))
    with torch.no_grad():
        form(*(tensor.detach() for tensor in random_qkv(8, torch.bfloat16)))
    form(*random_qkv(513, torch.bfloat16))
    assert len(calls) == 4
