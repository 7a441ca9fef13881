"""Requests that are computed together.

    requests ─▶ those that wait ─▶ batch ─▶ computed ─▶ answers
                    ▲ fills up while one is computed

Ray Serve's own batching closes a batch before the one ahead of it is done, so that without a pause every request would
be computed alone, and with one every request would be late.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any


class Batches:
    """A function of many as an awaitable function of one, on one event loop.

    Args:
        compute: many items to as many results.
        largest: items of a batch.
        wait: seconds for which an incomplete batch waits for more, after those that came during the one before.
    """

    def __init__(self, compute: Callable[[list[Any]], Awaitable[list[Any]]], largest: int, wait: float = 0.0) -> None:
        self._compute, self._largest, self._wait = compute, largest, wait
        self._waiting: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Any) -> Any:
        """The item's result; whoever is cancelled while waiting is not computed."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self._largest:
            self._full.set()
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._fill()
                await self._answer(self._taken())
        finally:
            self._task = None

    async def _fill(self) -> None:
        self._full.clear()
        if self._wait and len(self._waiting) < self._largest:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._wait)

    def _taken(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        batch: list[tuple[Any, asyncio.Future[Any]]] = []
        while self._waiting and len(batch) < self._largest:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _answer(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        if not batch:
            return
        try:
            results = await self._compute([item for item, _ in batch])
            assert len(results) == len(batch)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
