"""Dynamic batching: requests that arrive during a batch form the next one."""

import asyncio

import pytest

from bsq_ray.serving.batching import DynamicBatcher


class FakeModel:
    """Doubles numbers; records each batch and computes it after `release` is set."""

    def __init__(self):
        self.batches = []
        self.release = asyncio.Event()

    async def __call__(self, items):
        self.batches.append(list(items))
        await self.release.wait()
        if "bad" in items:
            raise ValueError("cannot double")
        return [2 * item for item in items]


def submit_items(batcher, *items):
    return [asyncio.create_task(batcher(item)) for item in items]


async def run_event_loop():
    for _ in range(5):
        await asyncio.sleep(0)


def test_batcher_requests_during_batch_form_the_next():
    """Requests that arrive during a batch form the next one."""

    async def scenario():
        model = FakeModel()
        batcher = DynamicBatcher(model, max_batch_size=4)
        responses = submit_items(batcher, 0)
        await run_event_loop()
        responses += submit_items(batcher, 1, 2, 3, 4, 5)
        await run_event_loop()
        assert model.batches == [[0]]
        model.release.set()
        assert await asyncio.gather(*responses) == [0, 2, 4, 6, 8, 10]
        assert model.batches == [[0], [1, 2, 3, 4], [5]]
        assert await batcher(6) == 12

    asyncio.run(scenario())


def test_batcher_waits_only_for_incomplete_batch():
    """An incomplete batch waits for more items; a full one starts immediately."""

    async def scenario():
        model = FakeModel()
        model.release.set()
        batcher = DynamicBatcher(model, max_batch_size=3, max_wait_s=0.2)
        responses = submit_items(batcher, 1)
        await asyncio.sleep(0.01)
        responses += submit_items(batcher, 2)
        assert await asyncio.gather(*responses) == [2, 4]
        long_wait_batcher = DynamicBatcher(model, max_batch_size=3, max_wait_s=100)
        assert await asyncio.wait_for(asyncio.gather(*submit_items(long_wait_batcher, 3, 4, 5)), 10) == [6, 8, 10]
        assert model.batches == [[1, 2], [3, 4, 5]]

    asyncio.run(scenario())


def test_batcher_failure_affects_only_its_batch():
    """A failure reaches every item of its batch and no item of another batch."""

    async def scenario():
        model = FakeModel()
        batcher = DynamicBatcher(model, max_batch_size=2)
        responses = submit_items(batcher, 1)
        await run_event_loop()
        responses += submit_items(batcher, "bad", 2, 3)
        model.release.set()
        first, *failed, last = await asyncio.gather(*responses, return_exceptions=True)
        assert (first, last) == (2, 6)
        for error in failed:
            with pytest.raises(ValueError, match="cannot double"):
                raise error

    asyncio.run(scenario())


def test_batcher_skips_cancelled_items():
    """Items whose caller was cancelled are not computed."""

    async def scenario():
        model = FakeModel()
        batcher = DynamicBatcher(model, max_batch_size=4)
        responses = submit_items(batcher, 1)
        await run_event_loop()
        cancelled, waiting = submit_items(batcher, 2, 3)
        await run_event_loop()
        cancelled.cancel()
        responses[0].cancel()
        await run_event_loop()
        model.release.set()
        assert await waiting == 6
        assert model.batches == [[1], [3]]

    asyncio.run(scenario())
