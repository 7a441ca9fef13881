"""Attention is the same function in both of its forms."""

import pytest
import torch
import torch.nn.functional as F

from bsq_ray.models.layers.attention import attention, causal_attention

FORMS = pytest.mark.parametrize(("form", "causal"), [(attention, False), (causal_attention, True)])


def given(tokens, dtype):
    torch.manual_seed(0)
    return [torch.randn(2, 3, tokens, 16).to(dtype).requires_grad_() for _ in range(3)]


def fused_calls(monkeypatch):
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *tensors, **how: calls.append(1) or original(*tensors, **how)
    )
    return calls


@FORMS
def test_spelt_out_for_learning_in_bf16_it_gives_the_values_and_gradients_of_the_exact_one(form, causal, monkeypatch):
    ours = given(40, torch.bfloat16)
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


@FORMS
def test_in_fp32_without_gradients_and_for_many_keys_it_is_the_fused_one(form, causal, monkeypatch):
    calls = fused_calls(monkeypatch)
    tensors = given(8, torch.float32)
    torch.testing.assert_close(form(*tensors), F.scaled_dot_product_attention(*tensors, is_causal=causal))
    with torch.no_grad():
        form(*(tensor.detach() for tensor in given(8, torch.bfloat16)))
    form(*given(513, torch.bfloat16))
    assert len(calls) == 4
