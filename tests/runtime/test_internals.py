"""Contracts with private APIs of DeepSpeed and PyTorch; a new version that changes one fails here."""

import sys

import pytest
import torch

from bsq_ray.config import load_config
from bsq_ray.runtime import _deepspeed_internals, _torch_internals
from bsq_ray.training.engines.engine import build_engine

CPU = torch.device("cpu")


@pytest.fixture
def engine():
    training_config = load_config("demo", ["training.engine.zero_stage=1"]).training
    return build_engine(torch.nn.Linear(4, 4), training_config, micro_batch=1, accumulation_steps=1, device=CPU)


def test_capture_checkpoint_writes_no_state(engine, tmp_path):
    """States reach the callback, no state file is written, and the checkpoint engine is restored."""
    states, original = {}, engine._ds_engine.checkpoint_engine

    def capture(state, path):
        states[path] = state

    _deepspeed_internals.capture_checkpoint(engine._ds_engine, str(tmp_path), "state", capture)
    assert sum(path.endswith("optim_states.pt") for path in states) == 1
    assert sum(path.endswith("model_states.pt") for path in states) == 1
    assert not list(tmp_path.rglob("*.pt"))
    assert engine._ds_engine.checkpoint_engine is original


def test_set_load_universal_changes_engine(engine):
    for enabled in (True, False):
        _deepspeed_internals.set_load_universal(engine._ds_engine, enabled)
        assert engine._ds_engine.load_universal_checkpoint() is enabled


def test_disable_shared_memory_op_keeps_backend_without_op(engine):
    """The backend of a process that has built an engine has no shared-memory operator."""
    import deepspeed.comm

    assert hasattr(sys.modules["deepspeed.comm.torch"], "TorchBackend")
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


def test_has_native_bf16_returns_bool():
    assert isinstance(_torch_internals.has_native_bf16(), bool)


def test_needs_input_grad_now_follows_requested_inputs():
    """Only inputs that the running backward pass reaches need a gradient."""
    needed = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, gradient):
            needed.append(_torch_internals.needs_input_grad_now(ctx))
            x, w = ctx.saved_tensors
            return gradient * w, gradient * x

    x, w = (torch.ones(2, requires_grad=True) for _ in range(2))
    # Intermediate values, because PyTorch raises for leaves.
    hidden_x, hidden_w = x * 1, w * 1
    y = Product.apply(hidden_x, hidden_w).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    y.backward()
    assert needed == [[True, False], [True, True]]
