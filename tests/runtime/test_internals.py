"""Contracts with private APIs of DeepSpeed and PyTorch; a new version that changes one fails here."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from process_group import spawn_group

from bsq_ray.config import load_config
from bsq_ray.runtime import _deepspeed_internals, _torch_internals
from bsq_ray.runtime import _zero_checkpoint_internals as zero_checkpoint
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.engines.repartition import part_size

CPU = torch.device("cpu")


@pytest.fixture
def engine():
    training_config = load_config("demo-gan", ["training.engine.zero_stage=1"]).training
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


def test_disable_shared_memory_op_keeps_backend_without_op(engine):
    """The backend of a process that has built an engine has no shared-memory operator."""
    import deepspeed.comm

    assert hasattr(sys.modules["deepspeed.comm.torch"], "TorchBackend")
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


def gradients_of_optimizer(rank, world_size):
    """Take a step of each stage with gradients that differ between workers.

    Returns:
        by stage, the flat gradients that the optimizer steps with, and those of this worker alone, in the order of the
        optimizer; and the owners of the slices of each parameter.
    """
    return {stage: gradients_of_stage(rank, stage) for stage in (1, 2)}


def gradients_of_stage(rank, stage):
    overrides = [f"training.engine.zero_stage={stage}", "training.optimizer.max_grad_norm=0"]
    training_config = load_config("demo-gan", overrides).training
    torch.manual_seed(0)
    # An odd number of values, so that a parameter is divided between the partitions and the last one is padded.
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7))
    engine = build_engine(module, training_config, micro_batch=1, accumulation_steps=1, device=CPU)
    slices = _deepspeed_internals.partition_slices(engine._ds_engine)
    inputs = torch.full((1, 5), 1.0 + rank)
    own = torch.autograd.grad(engine.module(inputs).square().sum(), list(slices))
    stepped = []
    engine._ds_engine.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: stepped.append(optimizer.param_groups[0]["params"][0].grad.clone())
    )
    engine.backward(engine(inputs).square().sum())
    engine.step(1e-3)
    own_values = torch.cat([value.reshape(-1) for value in own])
    return stepped[0].numpy(), own_values.numpy(), [[part.owner for part in parts] for parts in slices.values()]


def test_zero_optimizes_with_averages_of_own_slices():
    """Each worker steps with the averages of its partition of the flat gradients; a parameter lies in both."""
    results = spawn_group(2, gradients_of_optimizer)
    for stage in (1, 2):
        (first, own, owners), (second, own_of_other, owners_of_other) = (by_stage[stage] for by_stage in results)
        assert owners == owners_of_other
        assert [0, 1] in owners
        averages, expected = np.concatenate([first, second]), (own + own_of_other) / 2
        # Parameters start at multiples of four values.
        np.testing.assert_allclose(averages[averages != 0], expected[expected != 0], rtol=1e-6)


def zero_files(rank, world_size):
    """Return by stage the parameter groups, and this worker's flat tensors before and after replacing them in its file.

    The file contains negated values, and is read again.
    """
    results = {}
    for stage in (1, 2, 3):
        training_config = load_config("demo-gan", [f"training.engine.zero_stage={stage}"]).training
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7))
        engine = build_engine(module, training_config, micro_batch=1, accumulation_steps=1, device=CPU)
        engine.backward(engine(torch.ones(1, 5)).square().sum())
        engine.step(1e-3)
        with tempfile.TemporaryDirectory() as folder:
            paths = {}
            for name, write in engine.snapshot().items():
                paths[Path(name).name] = Path(folder, Path(name).name)
                write(paths[Path(name).name])
            [path] = [path for name, path in paths.items() if name.endswith("optim_states.pt")]
            state = zero_checkpoint.load_partition(path)
            before = zero_checkpoint.flat_tensors(state)
            negated = [{name: -value for name, value in group.items()} for group in before]
            zero_checkpoint.replace_flat_tensors(state, negated)
            torch.save(state, Path(folder, "replaced.pt"))
            after = zero_checkpoint.flat_tensors(zero_checkpoint.load_partition(Path(folder, "replaced.pt")))
            world_sizes = []
            for name in paths:
                if name.endswith("model_states.pt"):
                    target = Path(folder, "weights.pt")
                    zero_checkpoint.write_model_state(paths[name], target, 5)
                    world_sizes.append(torch.load(target, weights_only=False)["dp_world_size"])
            as_numpy = [[{k: v.numpy().copy() for k, v in group.items()} for group in part] for part in (before, after)]
            results[stage] = zero_checkpoint.flat_groups(engine._ds_engine), *as_numpy, world_sizes
    return results


@pytest.fixture(scope="module")
def zero_files_of_two():
    return spawn_group(2, zero_files)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_flat_groups_describe_partitions_of_zero(zero_files_of_two, stage):
    """A flat tensor has the size of the worker's parts of all segments; only padding of the weights is left out."""
    groups = zero_files_of_two[0][stage][0]
    assert [sum(group.segments) for group in groups] == [5 * 3 + 3 + 3 * 7 + 7]
    assert len(groups[0].segments) == (4 if stage == 3 else 1)
    expected = sum(part_size(segment, groups[0].alignment, 2) for segment in groups[0].segments)
    for by_stage in zero_files_of_two:
        [tensors] = by_stage[stage][1]
        assert tensors.keys() == {"fp32 weights", "exp_avg", "exp_avg_sq"}
        assert {tensors[name].shape for name in ("exp_avg", "exp_avg_sq")} == {(expected,)}
        assert expected - groups[0].alignment * 2 * len(groups[0].segments) < len(tensors["fp32 weights"]) <= expected


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_flat_tensors_are_replaced_in_file(zero_files_of_two, stage):
    """Values that are written to a file are those that are read from it, and so is the number of workers."""
    for rank, by_stage in enumerate(zero_files_of_two):
        _, [before], [after], world_sizes = by_stage[stage]
        for name, values in before.items():
            assert np.array_equal(after[name], -values), name
            assert np.any(values != 0), name
        assert world_sizes == ([5] if stage == 3 or rank == 0 else [])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("max_grad_norm", [0, 0.5])
def test_unread_gradient_norm_is_infinite_within_step(stage, max_grad_norm):
    """With a nonfinite gradient ZeRO reads nothing and steps its optimizer, which finds an infinite norm."""
    overrides = [f"training.engine.zero_stage={stage}", f"training.optimizer.max_grad_norm={max_grad_norm}"]
    training_config = load_config("demo-gan", overrides).training
    engine = build_engine(torch.nn.Linear(4, 4), training_config, micro_batch=1, accumulation_steps=1, device=CPU)
    norms = []
    engine._ds_engine.optimizer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(_deepspeed_internals.global_gradient_norm(engine._ds_engine))
    )
    for scale in (1.0, torch.nan):
        engine.backward(engine(torch.ones(1, 4)).sum() * scale)
        engine.step(1e-3)
    assert [torch.isfinite(norm).item() for norm in norms] == [True, False]
    assert norms[1] == torch.inf
    assert engine.found_nonfinite == 1


def test_skip_steps_if_set_keeps_weights_and_state():
    """While the flag is set, NaN gradients reach neither weights nor state, and no step is counted."""
    weight, flag = torch.nn.Parameter(torch.ones(3)), torch.zeros(())
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    _torch_internals.skip_steps_if_set(optimizer, flag)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3))
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    flag.fill_(1)
    weight.grad = torch.full((3,), torch.nan)
    optimizer.step()
    after = [weight.detach(), *optimizer.state[weight].values()]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


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
