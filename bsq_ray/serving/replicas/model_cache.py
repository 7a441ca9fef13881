"""The models of a replica that several models share: loaded by their first request, unloaded when they are idle.

Ray Serve's `multiplexed` is not used: it unloads a model only when another one needs its slot, also while a request
uses it, and never because the model is idle.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Model = TypeVar("Model")


@dataclass(eq=False)
class _CacheEntry(Generic[Model]):
    """A model, or the task that loads it.

    Attributes:
        num_users: requests that use the model or wait for it.
        idle_timer: unloads the model; None while it is in use.
    """

    task: asyncio.Task[Model]
    num_users: int = 0
    idle_timer: asyncio.TimerHandle | None = None


class ModelCache(Generic[Model]):
    """Keeps a limited number of models in memory, on one event loop.

    Args:
        load: loads the model of a name.
        on_unload: called after a model has left the cache.
        max_models: models in memory. A request for a further one replaces the model that was idle for longest, and
            waits if all are in use.
        idle_timeout_s: time after which a model without requests is unloaded.
    """

    def __init__(
        self,
        load: Callable[[str], Awaitable[Model]],
        on_unload: Callable[[], object],
        *,
        max_models: int,
        idle_timeout_s: float,
    ) -> None:
        self._load, self._on_unload = load, on_unload
        self._max_models, self._idle_timeout_s = max_models, idle_timeout_s
        # Idle longest first.
        self._entries: OrderedDict[str, _CacheEntry[Model]] = OrderedDict()
        self._slot_freed = asyncio.Event()

    @property
    def names(self) -> list[str]:
        """Names of the models in memory, the one that was idle for longest first."""
        return list(self._entries)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Model]:
        """Provide a model, which stays in memory during the block.

        Raises:
            Exception: raised by `load`; the next use tries again.
        """
        entry = await self._acquire(name)
        try:
            # A request that is canceled does not cancel the loading for the other ones.
            yield await asyncio.shield(entry.task)
        finally:
            self._release(name, entry)

    async def _acquire(self, name: str) -> _CacheEntry[Model]:
        while name not in self._entries and not self._has_free_slot():
            self._slot_freed.clear()
            await self._slot_freed.wait()
        if name not in self._entries:
            self._entries[name] = _CacheEntry(asyncio.ensure_future(self._run_load(name)))
        entry = self._entries[name]
        entry.num_users += 1
        if entry.idle_timer is not None:
            entry.idle_timer.cancel()
            entry.idle_timer = None
        self._entries.move_to_end(name)
        return entry

    async def _run_load(self, name: str) -> Model:
        return await self._load(name)

    def _has_free_slot(self) -> bool:
        """Return True if a model can be loaded; unload the one that was idle for longest if needed."""
        if len(self._entries) < self._max_models:
            return True
        # A model that is still loading cannot be unloaded, even if no request waits for it any more.
        idle = ((name, entry) for name, entry in self._entries.items() if not entry.num_users and entry.task.done())
        name_and_entry = next(idle, None)
        if name_and_entry is None:
            return False
        self._remove(*name_and_entry)
        return True

    def _release(self, name: str, entry: _CacheEntry[Model]) -> None:
        entry.num_users -= 1
        if entry.num_users:
            return
        if not entry.task.done():
            # All requests were canceled while the model was loading.
            entry.task.add_done_callback(lambda _: self._on_idle(name, entry))
            return
        self._on_idle(name, entry)

    def _on_idle(self, name: str, entry: _CacheEntry[Model]) -> None:
        # Several requests that were canceled while the model was loading each scheduled this call.
        if entry.num_users or entry.idle_timer is not None or self._entries.get(name) is not entry:
            return
        if entry.task.cancelled() or entry.task.exception() is not None:
            del self._entries[name]
        else:
            loop = asyncio.get_running_loop()
            entry.idle_timer = loop.call_later(self._idle_timeout_s, self._remove, name, entry)
        self._slot_freed.set()

    def _remove(self, name: str, entry: _CacheEntry[Model]) -> None:
        removed = self._entries.pop(name)
        assert removed is entry, name
        if entry.idle_timer is not None:
            entry.idle_timer.cancel()
        # The timer and this frame no longer refer to the model when the callback returns memory.
        entry.idle_timer = None
        del entry, removed
        self._slot_freed.set()
        self._on_unload()
