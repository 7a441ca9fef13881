"""The order of training: every sample once an epoch, whatever the workers, from any position on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray.data.order import Order, worker_positions

orders = st.builds(
    Order,
    shard_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
    seed=st.integers(0, 2**31),
    lanes=st.integers(1, 20),
    window=st.integers(1, 30),
)


def epoch_samples(order, epoch):
    epochs, samples = order.at(np.arange(order.samples) + epoch * order.samples)
    assert (epochs == epoch).all()
    return samples


@given(orders, st.integers(0, 1000))
def test_order_epoch_contains_every_sample_once(order, epoch):
    """Every epoch contains every sample exactly once."""
    assert sorted(epoch_samples(order, epoch)) == list(range(order.samples))


@given(orders, st.integers(0, 500), st.integers(1, 100))
def test_order_at_position_is_independent_of_start(order, start, length):
    """The order at a position does not depend on the position where reading starts."""
    whole = np.stack(order.at(np.arange(start + length)))
    assert np.array_equal(whole[:, start:], np.stack(order.at(np.arange(start, start + length))))


@given(orders, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9))
def test_worker_positions_partition_each_batch(order, world_size, first_batch):
    """The workers together read each position of a batch exactly once."""
    batch = 12
    first, stop = first_batch * batch, (first_batch + 3) * batch
    parts = [worker_positions(first, stop, batch, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts)) == list(range(first, stop))
    assert len({len(part) for part in parts}) == 1


def test_order_differs_by_epoch_and_seed_and_repeats():
    """Epochs and seeds give different orders, and each order is reproducible."""
    order = Order((50, 50, 50), seed=1, interleave=4, shuffle_block_size=20)
    other = Order((50, 50, 50), seed=2, interleave=4, shuffle_block_size=20)
    assert not np.array_equal(epoch_samples(order, 0), epoch_samples(order, 1))
    assert not np.array_equal(epoch_samples(order, 0), epoch_samples(other, 0))
    assert np.array_equal(epoch_samples(order, 7), epoch_samples(order, 7))


def test_order_small_batch_spans_many_shards():
    """Lanes are far apart, so the samples of a small batch are from many shards."""
    order = Order((100,) * 64, seed=0, interleave=16, shuffle_block_size=50)
    _, samples = order.at(np.arange(16))
    assert len(set(samples // 100)) >= 12


def test_worker_positions_touch_few_shards_at_a_time():
    """One worker reads from few shards at a time."""
    order = Order((1000,) * 64, seed=0, interleave=16, shuffle_block_size=200)
    _, samples = order.at(worker_positions(0, 64 * 100, 64, rank=3, world_size=8))
    assert len(set(samples // 1000)) <= 4


def test_order_of_a_million_samples_is_fast():
    """The order of more than a million samples is computed quickly."""
    order = Order((1000,) * 1281, seed=0, interleave=16, shuffle_block_size=512)
    _, samples = order.at(np.arange(5 * 10**6, 5 * 10**6 + 256))
    assert len(set(samples)) == 256


def test_worker_positions_uneven_split_raises():
    """A batch size that the number of workers does not divide raises an error."""
    with pytest.raises(ValueError, match="batch_size 32 cannot be shared evenly by 3 workers"):
        worker_positions(0, 32, 32, 0, 3)
