"""The convolution is PyTorch's, and so are its derivatives of first, second and third order."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bsq_ray.models.ops.conv_double_backward import convolution

CASES = [
    # images, weights, stride, padding
    ((2, 3, 6, 5), (4, 3, 3, 3), 1, 1),
    ((2, 3, 7, 8), (4, 3, 3, 3), 2, 0),
    ((1, 2, 8, 8), (3, 2, 4, 4), 2, 1),
    ((2, 3, 4, 4), (2, 3, 1, 1), 1, 0),
    ((1, 2, 3, 5, 4), (2, 2, 3, 3, 3), 1, 1),
]


def inputs(shape, weights):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, weights, weights[:1])]
    return [tensor.requires_grad_() for tensor in tensors]


def pytorch_convolution(x, w, bias, stride, padding):
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, w, bias, stride, padding)


@pytest.mark.parametrize(("shape", "weights", "stride", "padding"), CASES)
def test_convolution_first_derivatives_match_pytorch(shape, weights, stride, padding):
    results = []
    for function in (convolution, pytorch_convolution):
        tensors = inputs(shape, weights)
        y = function(*tensors, stride, padding)
        results.append([y, *torch.autograd.grad(y.sin().sum(), tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("shape", "weights", "stride", "padding"), CASES)
def test_convolution_gradgradcheck_passes(shape, weights, stride, padding):
    x, w, bias = inputs(shape, weights)

    def call(x, w, bias):
        return convolution(x, w, bias, stride, padding)

    assert torch.autograd.gradcheck(call, (x, w, bias))
    assert torch.autograd.gradgradcheck(call, (x, w, bias))


def test_convolution_third_derivatives_match_pytorch():
    """Check each of the three functions in turn."""
    results = []
    for function in (convolution, pytorch_convolution):
        x, w, bias = inputs(*CASES[1][:2])
        values = [function(x, w, bias, 2, 0).pow(4).sum()]
        for _ in range(3):
            gradients = torch.autograd.grad(values[-1], (x, w, bias), create_graph=True)
            values.append(sum((gradient**2).sum() for gradient in gradients))
        results.append(values)
    torch.testing.assert_close(*results)


def test_convolution_autocast_output_bf16_gradients_fp32():
    """Under autocast the output is bf16, and gradients of first and second order are fp32 and close to the fp32
    ones.
    """
    x, w, bias = (tensor.detach().float().requires_grad_() for tensor in inputs(*CASES[0][:2]))
    with torch.autocast("cpu", torch.bfloat16):
        y = convolution(x, w, bias, padding=1)
        gradients = torch.autograd.grad(y.float().pow(2).sum(), (x, w, bias), create_graph=True)
        sum(gradient.pow(2).sum() for gradient in gradients).backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.conv2d(x, w, bias, padding=1), atol=0.05, rtol=0.02)
    assert {gradient.dtype for gradient in (*gradients, x.grad, w.grad)} == {torch.float32}
    fp32_inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, w, bias)]
    exact = torch.autograd.grad(convolution(*fp32_inputs, padding=1).pow(2).sum(), fp32_inputs, create_graph=True)
    sum(gradient.pow(2).sum() for gradient in exact).backward()
    for ours, theirs in ((x.grad, fp32_inputs[0].grad), (w.grad, fp32_inputs[1].grad)):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def count_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_convolution_unneeded_gradient_is_not_computed():
    """A gradient takes as many operations as the convolution, and is calculated for what wants one."""
    x, w, _ = inputs(*CASES[0][:2])
    once = count_flops(lambda: convolution(x, w, padding=1))
    assert count_flops(lambda: torch.autograd.grad(convolution(x, w.detach(), padding=1).sum(), x)) == 2 * once
    assert count_flops(lambda: torch.autograd.grad(convolution(x.detach(), w, padding=1).sum(), w)) == 2 * once
    assert count_flops(lambda: torch.autograd.grad(convolution(x, w, padding=1).sum(), (x, w))) == 3 * once


def test_convolution_gradient_penalty_takes_five_convolutions():
    """Forward pass, gradient of the images, its derivative in both, and the backward pass from the start."""
    x, w, _ = inputs(*CASES[0][:2])

    def penalty():
        [gradient] = torch.autograd.grad(convolution(x, w, padding=1).pow(2).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.pow(2).sum(), w)

    assert count_flops(penalty) == 5 * count_flops(lambda: convolution(x, w, padding=1))
