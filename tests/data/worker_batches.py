"""Batches of the workers of a run, and their comparison with those of one worker."""

from itertools import islice

from bsq_ray.data.stream import training_batches


def batches_of(source, run, count, rank=0, world_size=1, position=0, executor="local"):
    """The first batches of a worker after a position, with seed 1."""
    stream = training_batches(
        source, run.data, batch_size=run.training.batch_size, rank=rank, world_size=world_size, seed=1,
        position=position, executor=executor,
    )  # fmt: skip
    batches = list(islice(stream, count))
    stream.close()
    return batches


def assert_resumes_exactly(source, run, whole, first, count):
    """Batches `first` to `first + count` of an uninterrupted run are those after a stop, on one worker and on four."""
    position = first * run.training.batch_size
    for world_size in (1, 4):
        resumed = [batches_of(source, run, count, rank, world_size, position) for rank in range(world_size)]
        for expected, *parts in zip(whole[first : first + count], *resumed, strict=True):
            for rank, part in enumerate(parts):
                assert part.keys == expected.keys[rank::world_size]
                assert part.values_B.equal(expected.values_B[rank::world_size])


def assert_same_batches(batches, expected_batches):
    for batch, expected in zip(batches, expected_batches, strict=True):
        assert batch.keys == expected.keys
        assert batch.values_B.equal(expected.values_B)
