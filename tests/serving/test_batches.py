"""Requests that are computed together: those that came while others were computed."""

import asyncio

import pytest

from bsq_ray.serving.batching import DynamicBatcher


class FakeModel:
    """Doubles numbers; each batch waits for `go` and is written down."""

    def __init__(self):
        self.batches = []
        self.release = asyncio.Event()

    async def __call__(self, items):
        self.batches.append(list(items))
        await self.release.wait()
        if "bad" in items:
            raise ValueError("cannot double")
        return [2 * item for item in items]


def submit_items(batches, *items):
    return [asyncio.create_task(batches(item)) for item in items]


async def run_event_loop():
    for _ in range(5):
        await asyncio.sleep(0)


def test_batcher_requests_during_batch_form_the_next():
    """Requests that arrive during a batch form the next one."""

    async def story():
        computing = FakeModel()
        batches = DynamicBatcher(computing, largest=4)
        responses = submit_items(batches, 0)
        await run_event_loop()
        responses += submit_items(batches, 1, 2, 3, 4, 5)
        await run_event_loop()
        assert computing.batches == [[0]]
        computing.go.set()
        assert await asyncio.gather(*responses) == [0, 2, 4, 6, 8, 10]
        assert computing.batches == [[0], [1, 2, 3, 4], [5]]
        assert await batches(6) == 12

    asyncio.run(story())


def test_batcher_waits_only_for_incomplete_batch():
    """An incomplete batch waits for more items; a full one starts immediately."""

    async def story():
        computing = FakeModel()
        computing.go.set()
        batches = DynamicBatcher(computing, largest=3, wait=0.2)
        responses = submit_items(batches, 1)
        await asyncio.sleep(0.01)
        responses += submit_items(batches, 2)
        assert await asyncio.gather(*responses) == [2, 4]
        long_wait_batcher = DynamicBatcher(computing, largest=3, wait=100)
        assert await asyncio.wait_for(asyncio.gather(*submit_items(long_wait_batcher, 3, 4, 5)), 10) == [6, 8, 10]
        assert computing.batches == [[1, 2], [3, 4, 5]]

    asyncio.run(story())


def test_batcher_failure_affects_only_its_batch():
    """A failure reaches every item of its batch and no item of another batch."""

    async def story():
        computing = FakeModel()
        batches = DynamicBatcher(computing, largest=2)
        responses = submit_items(batches, 1)
        await run_event_loop()
        responses += submit_items(batches, "bad", 2, 3)
        computing.go.set()
        first, *failed, last = await asyncio.gather(*responses, return_exceptions=True)
        assert (first, last) == (2, 6)
        for error in failed:
            with pytest.raises(ValueError, match="cannot double"):
                raise error

    asyncio.run(story())


def test_batcher_skips_cancelled_items():
    """Items whose caller was cancelled are not computed."""

    async def story():
        computing = FakeModel()
        batches = DynamicBatcher(computing, largest=4)
        responses = submit_items(batches, 1)
        await run_event_loop()
        cancelled, waiting = submit_items(batches, 2, 3)
        await run_event_loop()
        cancelled.cancel()
        responses[0].cancel()
        await run_event_loop()
        computing.go.set()
        assert await waiting == 6
        assert computing.batches == [[1], [3]]

    asyncio.run(story())
