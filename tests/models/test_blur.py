"""The low-pass filter before the stride, and its derivatives."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bsq_ray.models.ops.blur import _load_kernels, blur

SHAPES = pytest.mark.parametrize(("stride", "pad"), [(1, 2), (2, 1)], ids=["before a stride", "with the stride"])


def reference_blur(x, stride, pad):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=pad, groups=x.shape[1])


@SHAPES
def test_blur_matches_depthwise_convolution(stride, pad):
    """The blur equals a depthwise convolution and keeps a constant image constant."""
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(blur(x, stride, pad), reference_blur(x, stride, pad))
    flat = torch.ones(1, 2, 8, 8)
    inside = blur(flat, stride, pad)[..., 2:-2, 2:-2] if stride == 1 else blur(flat, stride, pad)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.ones_like(inside))


@SHAPES
def test_blur_gradcheck_first_and_second_order_pass(stride, pad):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: blur(x, stride, pad), (x,))
    # A linear function has no second derivative, so it is followed by one that has.
    assert torch.autograd.gradgradcheck(lambda x: blur(x, stride, pad).pow(3), (x,))


@SHAPES
def test_blur_autocast_filters_in_bf16_with_fp32_gradients(stride, pad):
    """Under autocast the blur runs in bf16 and its input gradient is fp32."""
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        filtered = blur(x, stride, pad)
        assert filtered.dtype == torch.bfloat16
        filtered.square().sum().backward()
    assert x.grad.dtype == torch.float32
    exact = x.detach().requires_grad_()
    reference_blur(exact, stride, pad).square().sum().backward()
    torch.testing.assert_close(x.grad, exact.grad, rtol=0.05, atol=0.05)


@SHAPES
def test_blur_double_backward_cost_independent_of_channels(stride, pad):
    """The second derivative launches the same number of convolutions for any number of channels."""

    def count_convolutions(channels):
        x = torch.randn(1, channels, 8, 8, requires_grad=True)
        [gradient] = torch.autograd.grad(blur(x, stride, pad).pow(3).sum(), x, create_graph=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            gradient.square().sum().backward()
        return sum(event.count for event in profiler.key_averages() if event.key == "aten::convolution")

    assert count_convolutions(64) == count_convolutions(2)


def test_blur_without_triton_falls_back_and_warns(caplog, monkeypatch):
    """If the Triton kernels cannot be built, the blur falls back to PyTorch and logs a warning."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "bsq_ray.models.ops.blur_triton", raising=False)
    monkeypatch.delattr("bsq_ray.models.ops.blur_triton", raising=False)
    assert _load_kernels.__wrapped__(torch.device("cuda", 0)) is None
    assert "which makes the filter several times slower (import of triton halted" in caplog.text


def test_blur_out_of_memory_does_not_disable_kernels(monkeypatch):
    """An out-of-memory error while building the kernels is raised, not cached as "no kernels"."""

    def blur_out_of_memory(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(sys.modules, "bsq_ray.models.ops.blur_triton", SimpleNamespace(blur=blur_out_of_memory))
    monkeypatch.setattr("bsq_ray.models.ops.blur_triton", sys.modules["bsq_ray.models.ops.blur_triton"], raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        _load_kernels.__wrapped__(torch.device("cpu"))
