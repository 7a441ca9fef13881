"""Growth of what each worker does with the number of workers, simulated in one process."""

import statistics
import time

import numpy as np
import pytest
import torch
from simulated_workers import SimulatedGroup
from small_runs import small_spec
from test_many_workers import IdleCheckpoints, make_order, write_checkpoint

from bsq_ray.training.control_sync import ControlSync

pytestmark = pytest.mark.benchmark
_BENCHMARK, _CHUNK, _STEPS = "growth-workers-cpu", 256, 20


def order_ms(world_size):
    """Return the CPU time of the next 256 samples of one worker."""
    order, times = make_order(), []
    order.at(np.arange(8))
    for chunk in range(8):
        first = chunk * _CHUNK * world_size
        start = time.thread_time()
        order.at(np.arange(first, first + _CHUNK * world_size, world_size, dtype=np.int64))
        times.append(time.thread_time() - start)
    return 1e3 * statistics.median(times)


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_growth_of_a_worker(world_size, tmp_path, monkeypatch, record):
    def exchange(worker):
        control = ControlSync(small_spec("shards", "run", minutes=1.0), worker, IdleCheckpoints())
        for step in range(_STEPS):
            control.send(elapsed_s=0.0, found_nonfinite=torch.zeros(()))
            control.receive(step, elapsed_s=0.0)

    group = SimulatedGroup(world_size)
    group.run(exchange, monkeypatch)
    checkpoints, seconds = write_checkpoint(tmp_path, world_size, monkeypatch)
    sent_bytes = checkpoints.message_bytes[0]
    record(
        _BENCHMARK,
        str(world_size),
        order_ms=order_ms(world_size),
        control_bytes=sum(group.message_bytes[0]) // _STEPS,
        checkpoint_bytes=sum(sent_bytes),
        checkpoint_received_bytes=sum(map(sum, checkpoints.message_bytes.values())),
        checkpoint_ms=1e3 * statistics.median(seconds),
    )
