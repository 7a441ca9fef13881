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
def test_an_epoch_has_every_sample_once(order, epoch):
    assert sorted(epoch_samples(order, epoch)) == list(range(order.samples))


@given(orders, st.integers(0, 500), st.integers(1, 100))
def test_the_order_at_a_position_does_not_depend_on_how_it_was_reached(order, start, length):
    whole = np.stack(order.at(np.arange(start + length)))
    assert np.array_equal(whole[:, start:], np.stack(order.at(np.arange(start, start + length))))


@given(orders, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9))
def test_workers_together_take_each_position_of_a_batch_once(order, world, first_batch):
    batch = 12
    first, stop = first_batch * batch, (first_batch + 3) * batch
    parts = [worker_positions(first, stop, batch, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == list(range(first, stop))
    assert len({len(part) for part in parts}) == 1


def test_epochs_and_seeds_differ_and_repeat_themselves():
    order = Order((50, 50, 50), seed=1, lanes=4, window=20)
    other = Order((50, 50, 50), seed=2, lanes=4, window=20)
    assert not np.array_equal(epoch_samples(order, 0), epoch_samples(order, 1))
    assert not np.array_equal(epoch_samples(order, 0), epoch_samples(other, 0))
    assert np.array_equal(epoch_samples(order, 7), epoch_samples(order, 7))


def test_consecutive_samples_of_a_batch_come_from_different_places():
    """Lanes are far apart, so the samples of a small batch are from many shards."""
    order = Order((100,) * 64, seed=0, lanes=16, window=50)
    _, samples = order.at(np.arange(16))
    assert len(set(samples // 100)) >= 12


def test_a_worker_reads_few_shards_at_a_time():
    order = Order((1000,) * 64, seed=0, lanes=16, window=200)
    _, samples = order.at(worker_positions(0, 64 * 100, 64, rank=3, world=8))
    assert len(set(samples // 1000)) <= 4


def test_a_million_samples_are_ordered_in_a_moment():
    order = Order((1000,) * 1281, seed=0, lanes=16, window=512)
    _, samples = order.at(np.arange(5 * 10**6, 5 * 10**6 + 256))
    assert len(set(samples)) == 256


def test_an_uneven_share_is_refused():
    with pytest.raises(ValueError, match="batch_size 32 cannot be shared evenly by 3 workers"):
        worker_positions(0, 32, 32, 0, 3)
