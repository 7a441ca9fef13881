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
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, weights, weights[:1])]
    return [tensor.requires_grad_() for tensor in made]


def of_pytorch(x, w, bias, stride, padding):
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, w, bias, stride, padding)


@pytest.mark.parametrize(("shape", "weights", "stride", "padding"), CASES)
def test_values_and_first_derivatives_are_pytorchs(shape, weights, stride, padding):
    results = []
    for function in (convolution, of_pytorch):
        tensors = inputs(shape, weights)
        y = function(*tensors, stride, padding)
        results.append([y, *torch.autograd.grad(y.sin().sum(), tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("shape", "weights", "stride", "padding"), CASES)
def test_second_derivatives_are_those_of_differences(shape, weights, stride, padding):
    x, w, bias = inputs(shape, weights)

    def call(x, w, bias):
        return convolution(x, w, bias, stride, padding)

    assert torch.autograd.gradcheck(call, (x, w, bias))
    assert torch.autograd.gradgradcheck(call, (x, w, bias))


def test_third_derivatives_are_pytorchs():
    """Of each function of the three in turn."""
    results = []
    for function in (convolution, of_pytorch):
        x, w, bias = inputs(*CASES[1][:2])
        found = [function(x, w, bias, 2, 0).pow(4).sum()]
        for _ in range(3):
            gradients = torch.autograd.grad(found[-1], (x, w, bias), create_graph=True)
            found.append(sum((gradient**2).sum() for gradient in gradients))
        results.append(found)
    torch.testing.assert_close(*results)


def test_under_autocast_everything_is_in_its_precision():
    x, w, bias = (tensor.detach().float().requires_grad_() for tensor in inputs(*CASES[0][:2]))
    with torch.autocast("cpu", torch.bfloat16):
        y = convolution(x, w, bias, padding=1)
        gradients = torch.autograd.grad(y.float().pow(2).sum(), (x, w, bias), create_graph=True)
        sum(gradient.pow(2).sum() for gradient in gradients).backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.conv2d(x, w, bias, padding=1), atol=0.05, rtol=0.02)
    assert {gradient.dtype for gradient in (*gradients, x.grad, w.grad)} == {torch.float32}
    whole = [tensor.detach().clone().requires_grad_() for tensor in (x, w, bias)]
    exact = torch.autograd.grad(convolution(*whole, padding=1).pow(2).sum(), whole, create_graph=True)
    sum(gradient.pow(2).sum() for gradient in exact).backward()
    for ours, theirs in ((x.grad, whole[0].grad), (w.grad, whole[1].grad)):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_what_learns_nothing_costs_nothing():
    """A gradient takes as many operations as the convolution, and is calculated for what wants one."""
    x, w, _ = inputs(*CASES[0][:2])
    once = operations(lambda: convolution(x, w, padding=1))
    assert operations(lambda: torch.autograd.grad(convolution(x, w.detach(), padding=1).sum(), x)) == 2 * once
    assert operations(lambda: torch.autograd.grad(convolution(x.detach(), w, padding=1).sum(), w)) == 2 * once
    assert operations(lambda: torch.autograd.grad(convolution(x, w, padding=1).sum(), (x, w))) == 3 * once


def test_a_gradient_penalty_on_images_takes_no_more_than_it_needs():
    """Forward, the images' gradient, its own derivative in both, and the way back from where it began."""
    x, w, _ = inputs(*CASES[0][:2])

    def penalty():
        [gradient] = torch.autograd.grad(convolution(x, w, padding=1).pow(2).sum(), x, create_graph=True)
        torch.autograd.grad(gradient.pow(2).sum(), w)

    assert operations(penalty) == 5 * operations(lambda: convolution(x, w, padding=1))
