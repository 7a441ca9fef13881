"""Private APIs of PyTorch, one function each; contract tests are in tests/runtime/test_internals.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_native_bf16() -> bool:
    """Return True if this CPU has bf16 instructions (AVX-512 BF16 or AMX).

    Why: without them bf16 autocast is slower than fp32.
    Seen in: PyTorch 2.13, where `torch.backends.cpu.get_cpu_capability()` does not report bf16.
    Public replacement: a public `torch.cpu.is_bf16_supported`.
    Contract test: test_has_native_bf16_returns_bool.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def needs_input_grad_now(ctx: Any) -> list[bool]:
    """Return for each tensor input of an autograd function whether the running backward pass needs its gradient.

    Why: `ctx.needs_input_grad` is also True for inputs that the running `torch.autograd.grad` call does not reach. The
    R1 penalty needs gradients of the images alone; the weights' would be most of its cost.
    Seen in: PyTorch 2.13, `torch._C._will_engine_execute_node` and `ctx.next_functions`.
    Public replacement: a `needs_input_grad` that follows the running backward pass.
    Contract test: test_needs_input_grad_now_follows_requested_inputs.
    """
    needed = []
    for node, _ in ctx.next_functions:
        try:
            needed.append(node is not None and torch._C._will_engine_execute_node(node))
        except RuntimeError:
            # PyTorch raises for a leaf that `torch.autograd.grad` was called with.
            needed.append(True)
    return needed


def skip_steps_if_set(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """Make the steps of a fused optimizer change neither weights nor state while `flag` is 1, without reading it.

    Why: a nonfinite gradient must not reach the weights, and the host must not wait for the gradient norm.
    Seen in: PyTorch 2.13, where `torch.amp.GradScaler` sets the attribute `found_inf` of fused optimizers.
    Public replacement: an argument of `Optimizer.step`.
    Contract test: test_skip_steps_if_set_keeps_weights_and_state.

    Args:
        optimizer: AdamW with `fused=True`, or `Muon` of this package.
        flag: fp32 scalar, 0 or 1, on the device of the parameters.
    """
    optimizer.found_inf = flag  # type: ignore[attr-defined]
