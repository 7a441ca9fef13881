"""The low-pass filter before the stride, and its derivatives."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bsq_ray.models.ops.blur import _kernels, blur

SHAPES = pytest.mark.parametrize(("stride", "pad"), [(1, 2), (2, 1)], ids=["before a stride", "with the stride"])


def by_definition(x, stride, pad):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=pad, groups=x.shape[1])


@SHAPES
def test_it_is_a_convolution_of_every_channel(stride, pad):
    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(blur(x, stride, pad), by_definition(x, stride, pad))
    flat = torch.ones(1, 2, 8, 8)
    inside = blur(flat, stride, pad)[..., 2:-2, 2:-2] if stride == 1 else blur(flat, stride, pad)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.ones_like(inside))


@SHAPES
def test_derivatives_of_first_and_second_order_are_right(stride, pad):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: blur(x, stride, pad), (x,))
    # A linear function has no second derivative, so it is followed by one that has.
    assert torch.autograd.gradgradcheck(lambda x: blur(x, stride, pad).pow(3), (x,))


@SHAPES
def test_under_autocast_it_filters_in_half_precision_and_gradients_come_back_whole(stride, pad):
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        filtered = blur(x, stride, pad)
        assert filtered.dtype == torch.bfloat16
        filtered.square().sum().backward()
    assert x.grad.dtype == torch.float32
    exact = x.detach().requires_grad_()
    by_definition(exact, stride, pad).square().sum().backward()
    torch.testing.assert_close(x.grad, exact.grad, rtol=0.05, atol=0.05)


@SHAPES
def test_the_second_derivative_takes_no_more_convolutions_for_more_channels(stride, pad):
    def convolutions(channels):
        x = torch.randn(1, channels, 8, 8, requires_grad=True)
        [gradient] = torch.autograd.grad(blur(x, stride, pad).pow(3).sum(), x, create_graph=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            gradient.square().sum().backward()
        return sum(event.count for event in profiler.key_averages() if event.key == "aten::convolution")

    assert convolutions(64) == convolutions(2)


def test_where_kernels_cannot_be_built_the_library_filters_and_that_is_said(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "bsq_ray.models.ops.blur_triton", raising=False)
    monkeypatch.delattr("bsq_ray.models.ops.blur_triton", raising=False)
    assert _kernels.__wrapped__(torch.device("cuda", 0)) is None
    assert "will take several times as long: no kernel for cuda:0 (import of triton halted" in caplog.text


def test_a_gpu_that_is_full_for_a_moment_does_not_lose_its_kernels_for_good(monkeypatch):
    def filtered(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(sys.modules, "bsq_ray.models.ops.blur_triton", SimpleNamespace(filtered=filtered))
    monkeypatch.setattr("bsq_ray.models.ops.blur_triton", sys.modules["bsq_ray.models.ops.blur_triton"], raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        _kernels.__wrapped__(torch.device("cpu"))
