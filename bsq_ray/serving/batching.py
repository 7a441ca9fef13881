"""Dynamic batching: requests that arrive while a batch is computed form the next batch.

    requests ─▶ pending ─▶ batch ─▶ computed ─▶ results
                  ▲ fills while the batch before is computed

`@serve.batch` is not used: it closes a batch before the one ahead of it is done. Without a wait every request would
be computed alone, and with a wait every request would be delayed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any


class DynamicBatcher:
    """Turns a function of many items into an awaitable function of one item, on one event loop.

    Args:
        compute: maps a list of items to a list of as many results.
        max_batch_size: maximum number of items in a batch.
        max_wait_s: time for which an incomplete batch waits for more items, after the batch before has finished.
    """

    def __init__(
        self, compute: Callable[[list[Any]], Awaitable[list[Any]]], max_batch_size: int, max_wait_s: float = 0.0
    ) -> None:
        self._compute, self._max_batch_size, self._max_wait_s = compute, max_batch_size, max_wait_s
        self._pending: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self._batch_full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Any) -> Any:
        """Return the result of an item; an item whose caller is canceled while it is pending is not computed."""
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
