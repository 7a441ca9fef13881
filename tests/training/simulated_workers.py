"""Worker groups of any size in one process: each worker is a thread, and collectives exchange values in memory."""

import pickle
import threading
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from bsq_ray.training.worker_context import ControlSignal, WorkerContext

_STACK_BYTES = 2**20
_TIMEOUT_S = 120


class SilentReporter:
    """Reporter of a worker without control signals; its records are discarded."""

    def record(self, record):
        pass

    def control_signal(self):
        return ControlSignal.CONTINUE


class FinishedWork:
    """Handle of a collective that has finished."""

    def wait(self):
        return True


@dataclass
class SimulatedGroup:
    """Collectives of torch.distributed between the threads of a group.

    Attributes:
        message_bytes: bytes that a worker contributed to each collective, by rank.
    """

    world_size: int
    message_bytes: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self):
        self._rank, self._slots = threading.local(), [None] * self.world_size
        self._combine, self._result = None, None
        # One thread combines the values of all workers.
        self._barrier = threading.Barrier(self.world_size, self._combine_slots, _TIMEOUT_S)

    def _combine_slots(self):
        if self._combine is not None:
            self._result = self._combine(self._slots)
            self._combine = None

    def _exchange(self, value, num_bytes, combine):
        rank = self._rank.value
        self.message_bytes.setdefault(rank, []).append(num_bytes)
        self._slots[rank], self._combine = value, combine
        self._barrier.wait()
        result = self._result
        self._barrier.wait()
        return result

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, async_op=False):
        def combine(tensors):
            stacked = torch.stack(tensors)
            return stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0)

        num_bytes = tensor.numel() * tensor.element_size()
        tensor.copy_(self._exchange(tensor.clone(), num_bytes, combine))
        return FinishedWork() if async_op else None

    def all_gather_object(self, values, value):
        values[:] = self._exchange(value, len(pickle.dumps(value)), list)

    def run(self, function, monkeypatch):
        """Return the results of `function(worker)` by rank, and the CPU seconds of each worker's thread.

        Raises:
            Exception: raised by a worker.
        """
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "all_gather_object", self.all_gather_object)
        results, errors, cpu_s = [None] * self.world_size, [], [0.0] * self.world_size

        def work(rank):
            self._rank.value = rank
            worker = WorkerContext(rank, self.world_size, torch.device("cpu"), "local", SilentReporter())
            try:
                start = time.thread_time()
                results[rank] = function(worker)
                cpu_s[rank] = time.thread_time() - start
            except Exception as error:
                errors.append(error)
                self._barrier.abort()

        previous = threading.stack_size(_STACK_BYTES)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        threading.stack_size(previous)
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return results, cpu_s
