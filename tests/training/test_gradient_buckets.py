"""Averages of gradients in buckets, started during the backward pass."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gradient_memory import GradientMemory
from process_group import spawn_group
from torch import nn

from bsq_ray.training.engines.gradient_buckets import GradientBuckets

WIDTH, NUM_LAYERS, MICRO_BATCHES = 4, 3, 2


def gradients(module):
    return {name: value.grad.numpy() for name, value in module.named_parameters() if value.grad is not None}


def average_steps(rank, world_size):
    """Average the gradients of two steps of two micro batches.

    Returns:
        By step, the gradients by name: averaged, and of this worker alone; and the events of the last backward pass:
        names of parameters whose gradient is complete, and sizes of all-reduces.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    model.register_parameter("frozen", nn.Parameter(torch.zeros(2), requires_grad=False))
    # Without buckets, for the gradients of this worker.
    alone = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))
    alone.load_state_dict({name: value for name, value in model.state_dict().items() if "." in name})
    events, all_reduce = [], dist.all_reduce

    def observed(values, *arguments, **settings):
        events.append(len(values))
        return all_reduce(values, *arguments, **settings)

    dist.all_reduce = observed
    buckets = GradientBuckets(model.parameters(), bucket_elements=WIDTH * (WIDTH + 1))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    torch.manual_seed(1 + rank)
    steps = []
    for _ in range(2):
        for module in (model, alone):
            module.zero_grad()
        for micro_batch in range(MICRO_BATCHES):
            inputs = torch.randn(5, WIDTH)
            if micro_batch == MICRO_BATCHES - 1:
                events.clear()
                buckets.start()
            for module in (model, alone):
                module(inputs).square().sum().backward()
        buckets.finish()
        steps.append([gradients(module) for module in (model, alone)])
    return steps, events


@pytest.fixture(scope="module")
def averages():
    """Results of `average_steps` by rank."""
    return spawn_group(2, average_steps)


def test_gradient_buckets_average_over_workers(averages):
    """Averages are those of the workers' accumulated gradients, in every step; unused parameters have none."""
    for step in range(2):
        (averaged, own), (averaged_of_other, own_of_other) = (steps[step] for steps, _ in averages)
        assert averaged.keys() == own.keys() == averaged_of_other.keys()
        assert len(averaged) == 2 * NUM_LAYERS
        for name in averaged:
            np.testing.assert_array_equal(averaged[name], averaged_of_other[name])
            np.testing.assert_allclose(averaged[name], (own[name] + own_of_other[name]) / 2, rtol=1e-6)


def test_gradient_buckets_start_during_backward_pass(averages):
    """Each layer is a bucket, and the last one is sent before the gradient of the first one is complete."""
    _, events = averages[0]
    assert [event for event in events if isinstance(event, int)] == [WIDTH * (WIDTH + 1)] * NUM_LAYERS
    assert events.index(WIDTH * (WIDTH + 1)) < events.index("0.weight")


def average_once(rank, world_size, communication_dtype):
    """Average the gradients of one backward pass.

    Returns:
        gradients by name, averaged and of this worker alone; the largest sum of bytes of gradients and buckets during
        the pass; and the number of storages of the averages.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    buckets = GradientBuckets(model.parameters(), communication_dtype, bucket_elements=64 * 65)
    memory = GradientMemory(model, buckets)
    torch.manual_seed(1 + rank)
    inputs = torch.randn(5, 64)
    buckets.start()
    model(inputs).square().sum().backward()
    buckets.finish()
    memory.observe()
    averaged = gradients(model)
    num_storages = len({value.grad.untyped_storage().data_ptr() for value in model.parameters()})
    alone = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    alone.load_state_dict(model.state_dict())
    alone(inputs).square().sum().backward()
    return averaged, gradients(alone), memory.peak_bytes, num_storages


def test_gradient_buckets_replace_their_gradients():
    """While a backward pass runs, gradients and buckets together never take more than the gradients and one bucket."""
    for _, own, peak_bytes, num_storages in spawn_group(2, average_once, torch.float32):
        gradient_bytes = sum(value.nbytes for value in own.values())
        assert num_storages == 8
        assert peak_bytes <= gradient_bytes + 4 * 64 * 65


def average_fp64(rank, world_size):
    """Return the average of a gradient in fp64 over the workers."""
    model = nn.Linear(1, 1, bias=False).double()
    buckets = GradientBuckets(model.parameters(), torch.float32)
    buckets.start()
    model(torch.tensor([[1 + (rank + 1) * 2.0**-40]], dtype=torch.float64)).sum().backward()
    buckets.finish()
    return gradients(model)["weight"]


def test_gradients_in_fp64_keep_their_precision():
    for [[average]] in spawn_group(2, average_fp64):
        assert average == 1 + 1.5 * 2.0**-40


@pytest.mark.parametrize("num_workers", [2, 4])
def test_gradient_buckets_in_bf16_round_once_per_worker(num_workers):
    """A bf16 average differs by at most one rounding per gradient and one per partial sum."""
    results = spawn_group(num_workers, average_once, torch.bfloat16)
    for name in results[0][0]:
        own = np.stack([result[1][name] for result in results]).astype(np.float64)
        error = np.abs(results[0][0][name] - own.mean(0))
        # Rounding to 8 significant bits changes a value by at most 2^-8 of it, and no sum exceeds that of magnitudes.
        num_roundings = 1 + (num_workers - 1)
        assert (error <= num_roundings * 2.0**-8 * 1.01 * np.abs(own).mean(0)).all()
        assert error.any()
        for result in results[1:]:
            np.testing.assert_array_equal(result[0][name], results[0][0][name])
