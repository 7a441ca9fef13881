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


class DynamicBatcher:
    """A function of many as an awaitable function of one, on one event loop.

    Args:
        compute: many items to as many results.
        largest: items of a batch.
        wait: seconds for which an incomplete batch waits for more, after those that came during the one before.
    """

    def __init__(
        self, compute: Callable[[list[Any]], Awaitable[list[Any]]], max_batch_size: int, max_wait_s: float = 0.0
    ) -> None:
        self._compute, self._max_batch_size, self._max_wait_s = compute, max_batch_size, max_wait_s
        self._pending: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self._batch_full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Any) -> Any:
        """The item's result; whoever is cancelled while waiting is not computed."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending.append((item, future))
        if len(self._pending) >= self._max_batch_size:
            self._batch_full.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._pending:
                await self._wait_until_full()
                await self._run_batch(self._take_batch())
        finally:
            self._task = None

    async def _wait_until_full(self) -> None:
        self._batch_full.clear()
        if self._max_wait_s and len(self._pending) < self._max_batch_size:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._batch_full.wait(), self._max_wait_s)

    def _take_batch(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        batch: list[tuple[Any, asyncio.Future[Any]]] = []
        while self._pending and len(batch) < self._max_batch_size:
            item, future = self._pending.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _run_batch(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
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
