"""Maximum of a few values over all workers, which the host reads later without waiting for the newest work.

    GPU:     step ─ values ─ step ──────────────────────────────
                      └─ all-reduce ─ copy to pinned memory ─ event       (a stream of its own)
    host:          start      enqueue a step                  finish      (waits for the event)

The event follows only the work that was enqueued before `start`, so a host that calls `finish` one step later finds
the values ready, and the GPU always has a step of work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class DeferredMax:
    """Exchanges one device value and `num_host_values` host values at a time.

    Args:
        device: device of the device value, and of the collective.
        world_size: number of workers; one worker gets its own values.
    """

    def __init__(self, device: torch.device, world_size: int, num_host_values: int) -> None:
        self._device, self._world_size = device, world_size
        self._on_gpu = device.type == "cuda"
        # Copies between the GPU and memory that is not pinned would wait for the stream.
        self._local = torch.zeros(1 + num_host_values, dtype=torch.float64, pin_memory=self._on_gpu)
        self._result = torch.zeros_like(self._local, pin_memory=self._on_gpu)
        self._values = self._local
        self._work: dist.Work | None = None
        if self._on_gpu:
            self._stream, self._event = torch.cuda.Stream(device), torch.cuda.Event()

    def start(self, device_value: Tensor, host_values: Sequence[float]) -> None:
        """Start the exchange and return at once; collective.

        Args:
            device_value: scalar on the device, as of the work enqueued so far.
            host_values: values of this worker.
        """
        self._local[1:] = torch.tensor(host_values, dtype=torch.float64)
        self._values = self._local.to(self._device, non_blocking=True, copy=True)
        self._values[:1].copy_(device_value)
        if not self._on_gpu:
            self._work = self._all_reduce()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if work := self._all_reduce():
                # The stream waits, not the host.
                work.wait()
            self._result.copy_(self._values, non_blocking=True)
            self._event.record(self._stream)

    def finish(self) -> list[float]:
        """Return the maximum of each value over all workers: the device value, then the host values."""
        if self._on_gpu:
            self._event.synchronize()
            return [float(value) for value in self._result.tolist()]
        if self._work is not None:
            self._work.wait()
        return [float(value) for value in self._values.tolist()]

    def _all_reduce(self) -> dist.Work | None:
        if self._world_size == 1:
            return None
        return dist.all_reduce(self._values, dist.ReduceOp.MAX, async_op=True)
