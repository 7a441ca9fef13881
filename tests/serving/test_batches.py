"""Requests that are computed together: those that came while others were computed."""

import asyncio

import pytest

from bsq_ray.serving.batching import Batches


class Computing:
    """Doubles numbers; each batch waits for `go` and is written down."""

    def __init__(self):
        self.batches = []
        self.go = asyncio.Event()

    async def __call__(self, items):
        self.batches.append(list(items))
        await self.go.wait()
        if "bad" in items:
            raise ValueError("cannot double")
        return [2 * item for item in items]


def ask(batches, *items):
    return [asyncio.create_task(batches(item)) for item in items]


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_comes_while_one_is_computed_is_computed_together():
    async def story():
        computing = Computing()
        batches = Batches(computing, largest=4)
        answers = ask(batches, 0)
        await turns()
        answers += ask(batches, 1, 2, 3, 4, 5)
        await turns()
        assert computing.batches == [[0]]
        computing.go.set()
        assert await asyncio.gather(*answers) == [0, 2, 4, 6, 8, 10]
        assert computing.batches == [[0], [1, 2, 3, 4], [5]]
        assert await batches(6) == 12

    asyncio.run(story())


def test_an_incomplete_batch_waits_for_more_and_a_complete_one_does_not():
    async def story():
        computing = Computing()
        computing.go.set()
        batches = Batches(computing, largest=3, wait=0.2)
        answers = ask(batches, 1)
        await asyncio.sleep(0.01)
        answers += ask(batches, 2)
        assert await asyncio.gather(*answers) == [2, 4]
        patient = Batches(computing, largest=3, wait=100)
        assert await asyncio.wait_for(asyncio.gather(*ask(patient, 3, 4, 5)), 10) == [6, 8, 10]
        assert computing.batches == [[1, 2], [3, 4, 5]]

    asyncio.run(story())


def test_a_failure_reaches_all_of_its_batch_and_no_other():
    async def story():
        computing = Computing()
        batches = Batches(computing, largest=2)
        answers = ask(batches, 1)
        await turns()
        answers += ask(batches, "bad", 2, 3)
        computing.go.set()
        first, *failed, last = await asyncio.gather(*answers, return_exceptions=True)
        assert (first, last) == (2, 6)
        for error in failed:
            with pytest.raises(ValueError, match="cannot double"):
                raise error

    asyncio.run(story())


def test_who_went_away_is_not_computed():
    async def story():
        computing = Computing()
        batches = Batches(computing, largest=4)
        answers = ask(batches, 1)
        await turns()
        gone, stayed = ask(batches, 2, 3)
        await turns()
        gone.cancel()
        answers[0].cancel()
        await turns()
        computing.go.set()
        assert await stayed == 6
        assert computing.batches == [[1], [3]]

    asyncio.run(story())
