"""Averages of the slices that a worker owns, sent during the backward pass, alone and with DeepSpeed's ZeRO-1 and 2."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gradient_memory import GradientMemory
from process_group import spawn_group
from torch import nn

from bsq_ray.config import load_config
from bsq_ray.runtime._deepspeed_internals import PartitionSlice
from bsq_ray.training.engines.deepspeed_engine import DeepSpeedEngine
from bsq_ray.training.engines.partition_buckets import PartitionBuckets
from bsq_ray.training.optimizers.build import build_adamw

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Branches(nn.Module):
    """A sum of branches, computed in the order of `order`; `unused` has no gradient.

    The backward pass reaches the last branch of `order` first.
    """

    def __init__(self, widths, order=None):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(5, width) for width in widths)
        self.unused = nn.Parameter(torch.zeros(3))
        self.order = order or range(len(widths))

    def forward(self, inputs):
        return sum(self.branches[index](inputs).square().sum() for index in self.order)


def equal_partitions(parameters, num_workers):
    """Return the slices of parameters by owner, where each worker owns an equal range of all elements."""
    parameters, offset = list(parameters), 0
    size = -(-sum(parameter.numel() for parameter in parameters) // num_workers)
    slices = {}
    for parameter in parameters:
        stop = offset + parameter.numel()
        slices[parameter] = [
            PartitionSlice(owner, max(owner * size, offset) - offset, min((owner + 1) * size, stop) - offset)
            for owner in range(offset // size, (stop - 1) // size + 1)
        ]
        offset = stop
    return slices


def reduce_scattered(gradients, slices, rank, num_workers, dtype):
    """Return the flat averages of this worker's slices by one reduce-scatter of all gradients."""
    parts = [
        [
            gradients[p].reshape(-1)[part.start : part.stop]
            for p in gradients
            for part in slices[p]
            if part.owner == owner
        ]
        for owner in range(num_workers)
    ]
    size = max(sum(map(len, own)) for own in parts)
    rows = [torch.cat([*own, torch.zeros(size - sum(map(len, own)))]) for own in parts]
    sums = torch.empty(size, dtype=dtype)
    dist.reduce_scatter_tensor(sums, torch.cat(rows).to(dtype))
    return sums[: sum(map(len, parts[rank]))].float() / num_workers


def observed_reductions(events):
    """Return a context in which the destination and the size of each reduction are appended to `events`."""
    reduce = dist.reduce

    def observed(values, destination, *arguments, **settings):
        events.append((destination, len(values)))
        return reduce(values, destination, *arguments, **settings)

    return mock.patch.object(dist, "reduce", observed)


def average_random_sizes(rank, num_workers):
    """Average gradients of modules of random sizes, in each data type.

    Returns:
        by data type and module, the averages of this worker: in buckets, by one reduce-scatter, and the mean of all
        workers' magnitudes; and the number of buckets.
    """
    return {name: average_modules(rank, num_workers, dtype) for name, dtype in DTYPES.items()}


def average_modules(rank, num_workers, dtype):
    results, random = [], np.random.default_rng(0)
    for _ in range(6):
        widths = [int(width) for width in random.integers(1, 40, random.integers(2, 7))]
        torch.manual_seed(0)
        model = Branches(widths)
        slices = equal_partitions(model.parameters(), num_workers)
        buckets = PartitionBuckets(slices, dtype, bucket_elements=int(random.integers(20, 200)))
        torch.manual_seed(rank)
        inputs = torch.randn(2, 5)
        # The gradients of two backward passes, without hooks and with them.
        used = [parameter for parameter in model.parameters() if parameter is not model.unused]
        values = [torch.autograd.grad(model(inputs[index]), used) for index in range(2)]
        own = {parameter: sum(parts) for parameter, *parts in zip(used, *values, strict=True)}
        expected = reduce_scattered(own, slices, rank, num_workers, dtype)
        for parameter, gradient in own.items():
            own[parameter] = gradient.abs()
        magnitudes = reduce_scattered(own, slices, rank, num_workers, torch.float32)
        model(inputs[0]).backward()
        buckets.start()
        model(inputs[1]).backward()
        averages = dict(buckets.averages())
        ordered = torch.cat([averages[parameter] for parameter in model.parameters() if parameter in averages])
        results.append((ordered.numpy(), expected.numpy(), magnitudes.numpy(), len(buckets._buckets)))
    return results


@pytest.mark.parametrize("num_workers", [2, 3])
def test_partition_averages_equal_one_reduce_scatter(num_workers):
    """Each worker gets the averages of its slices, up to the rounding of partial sums."""
    for by_dtype in spawn_group(num_workers, average_random_sizes):
        for name, precision in (("fp32", 2.0**-22), ("bf16", 2.0**-8)):
            assert max(num_buckets for *_, num_buckets in by_dtype[name]) > 2
            for averages, expected, magnitudes, _ in by_dtype[name]:
                # Both round each gradient in the same way, but may add up in another order.
                assert (np.abs(averages - expected) <= 2 * num_workers * precision * magnitudes).all()
                assert averages.any()


def average_in_own_order(rank, num_workers):
    """Average gradients with another order of the backward pass on each worker.

    Returns:
        indices of parameters in the order of their gradients, reductions, and the error of the averages.
    """
    widths = [7, 3, 9, 4]
    torch.manual_seed(0)
    model = Branches(widths, order=np.roll(range(len(widths)), rank).tolist())
    slices = equal_partitions(model.parameters(), num_workers)
    buckets = PartitionBuckets(slices, bucket_elements=20)
    parameters, completed, reductions = list(model.parameters()), [], []
    for index, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: completed.append(index))
    inputs = torch.full((5,), 1.0 + rank)
    used = [parameter for parameter in parameters if parameter is not model.unused]
    own = dict(zip(used, torch.autograd.grad(model(inputs), used), strict=True))
    expected = reduce_scattered(own, slices, rank, num_workers, torch.float32)
    with observed_reductions(reductions):
        buckets.start()
        model(inputs).backward()
        averages = dict(buckets.averages())
    ordered = torch.cat([averages[parameter] for parameter in parameters if parameter in averages])
    return completed, reductions, (ordered - expected).abs().max().item()


def test_partition_buckets_are_sent_in_same_order_by_all_workers():
    """Workers whose backward passes take another order send the same reductions in the same order."""
    results = spawn_group(3, average_in_own_order)
    assert len({tuple(completed) for completed, _, _ in results}) == 3
    assert len({tuple(reductions) for _, reductions, _ in results}) == 1
    assert {owner for owner, _ in results[0][1]} == {0, 1, 2}
    assert max(error for *_, error in results) < 1e-5


def largest_copies_by_dtype(rank, num_workers):
    return {name: largest_copies(num_workers, dtype) for name, dtype in DTYPES.items()}


def largest_copies(num_workers, dtype):
    """Return the bytes of all gradients, and the largest bytes of gradients and buckets in a backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    buckets = PartitionBuckets(equal_partitions(model.parameters(), num_workers), dtype, bucket_elements=64 * 65)
    memory = GradientMemory(model, buckets)
    buckets.start()
    model(torch.randn(5, 64)).square().sum().backward()
    for _ in buckets.averages():
        pass
    assert all(bucket.flat is None for bucket in buckets._buckets)
    return sum(4 * value.numel() for value in model.parameters()), memory.peak_bytes


def test_partition_buckets_replace_their_gradients():
    """While a backward pass runs, gradients and buckets take at most all buckets and the largest gradient."""
    for by_dtype in spawn_group(2, largest_copies_by_dtype):
        for name, bytes_per_element in (("fp32", 4), ("bf16", 2)):
            gradient_bytes, peak_bytes = by_dtype[name]
            # Placeholders take one element each.
            assert peak_bytes <= gradient_bytes * bytes_per_element / 4 + 4 * 64 * 65 + 1000


def build_zero(module, stage, accumulation_steps=1, bucket_elements=60):
    training_config = load_config("demo-gan", [f"training.engine.zero_stage={stage}"]).training
    optimizer = build_adamw(module.parameters(), training_config.optimizer)
    return DeepSpeedEngine(
        module, optimizer, training_config, 1, accumulation_steps, torch.zeros(()), bucket_elements=bucket_elements
    )


ZERO = [(stage, accumulation_steps) for stage in (1, 2) for accumulation_steps in (1, 2)]


def record_zero_steps(rank, num_workers):
    return {case: record_zero_step(*case) for case in ZERO}


def record_zero_step(stage, accumulation_steps):
    """Return the events of a step: numbers of micro batches, indices of complete gradients, reductions, "step"."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    engine = build_zero(module, stage, accumulation_steps)
    events = []
    for index, parameter in enumerate(module.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: events.append(f"gradient {index}"))
    with observed_reductions(events), mock.patch.object(dist, "reduce_scatter_tensor", side_effect=AssertionError):
        for micro_batch in range(accumulation_steps):
            events.append(f"micro batch {micro_batch}")
            engine.backward(engine(torch.randn(1, 8)).square().sum())
            if micro_batch == accumulation_steps - 1:
                events.append("step")
            engine.step(1e-3)
    return events


@pytest.fixture(scope="module")
def zero_steps():
    """Events of `record_zero_step` by rank, for each case."""
    return spawn_group(2, record_zero_steps)


@pytest.mark.parametrize(("stage", "accumulation_steps"), ZERO)
def test_zero_sends_buckets_during_last_backward_pass(zero_steps, stage, accumulation_steps):
    """The reductions of the last layers start before the gradients of the first ones; none waits for the step."""
    first, second = (by_case[stage, accumulation_steps] for by_case in zero_steps)
    assert first == second
    reductions = [index for index, event in enumerate(first) if isinstance(event, tuple)]
    assert len(reductions) >= 4
    assert sum(first[index][1] for index in reductions) >= 4 * 72
    last_micro_batch = first.index(f"micro batch {accumulation_steps - 1}")
    assert last_micro_batch < reductions[0]
    assert reductions[2] < first.index("gradient 1", last_micro_batch)
    assert reductions[-1] < first.index("step")


class BackwardError(Exception):
    """Error of a backward pass."""


class FailInBackward(torch.autograd.Function):
    """Identity whose backward pass raises."""

    @staticmethod
    def forward(_, x):
        return x * 1

    @staticmethod
    def backward(_, gradient):
        raise BackwardError


def fail_in_backward(rank, num_workers):
    """Run a backward pass that succeeds, and one that fails within its second bucket.

    Returns:
        number of reductions of the first pass, of the second one, and after the accumulation has been ended, as the
        destruction of an engine does.
    """
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    engine, reductions, counts = build_zero(module, stage=2, bucket_elements=100), [], []
    with observed_reductions(reductions):
        engine.backward(engine(torch.randn(1, 8)).square().sum())
        engine.step(1e-3)
        counts.append(len(reductions))
        reductions.clear()
        module[0].register_forward_hook(lambda _module, _inputs, output: FailInBackward.apply(output))
        with pytest.raises(BackwardError):
            engine.backward(engine(torch.randn(1, 8)).square().sum())
        counts.append(len(reductions))
        engine._accumulation.close()
        counts.append(len(reductions))
    return counts


def test_failed_backward_pass_sends_nothing_more():
    """After an error, a worker does not wait for others that have not failed."""
    for num_sent, num_before_error, num_at_end in spawn_group(2, fail_in_backward):
        assert 0 < num_before_error < num_sent
        assert num_at_end == num_before_error
