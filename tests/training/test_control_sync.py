"""The exchange between workers: it returns what was sent before the step, and one worker needs none."""

import torch
from process_group import spawn_group
from small_runs import RecordingReporter, local_worker, small_spec

from bsq_ray.training.control_sync import ControlSync
from bsq_ray.training.deferred_max import DeferredMax
from bsq_ray.training.worker_context import ControlSignal, WorkerContext


class IdleCheckpoints:
    """A checkpoint writer without a checkpoint in progress."""

    is_busy = False
    num_advances = 0

    def advance(self):
        self.num_advances += 1


class Signals:
    """Reporter that sends one signal after the other."""

    def __init__(self, *signals):
        self.signals = list(signals)

    def control_signal(self):
        return self.signals.pop(0)


def exchange(rank, world_size):
    """Return the results of two exchanges, and the control states of two steps."""
    deferred = DeferredMax(torch.device("cpu"), world_size, num_host_values=2)
    found, results = torch.zeros(()), []
    for step in range(2):
        deferred.start(found, [float(rank), float(-step)])
        # Later than the exchange, so it is part of the next one.
        found.fill_(rank)
        results.append(deferred.finish())
    reporter = Signals(ControlSignal.CONTINUE, ControlSignal.RESIZE) if rank == 0 else Signals()
    spec = small_spec("shards", "run", minutes=1.0)
    worker = WorkerContext(rank, world_size, torch.device("cpu"), "local", reporter)
    control = ControlSync(spec, worker, IdleCheckpoints())
    states = []
    for step in (1, 2):
        # The time of rank 0 counts.
        control.send(elapsed_s=30.0 if rank == 0 else 59.0, found_nonfinite=found)
        states.append(tuple(control.receive(step, elapsed_s=60.0)))
    return results, states


def test_exchange_returns_the_maximum_sent_before():
    for results, states in spawn_group(2, exchange):
        assert results == [[0.0, 1.0, 0.0], [1.0, 1.0, -1.0]]
        assert states == [(ControlSignal.CONTINUE, 0.5, True), (ControlSignal.RESIZE, 0.5, True)]


def test_one_worker_obeys_its_newest_signal():
    """Without other workers the signal and the time are those of the end of the step."""
    worker = local_worker(RecordingReporter())
    checkpoints = IdleCheckpoints()
    worker.reporter = Signals(ControlSignal.CONTINUE, ControlSignal.STOP)
    control = ControlSync(small_spec("shards", "run", minutes=1.0), worker, checkpoints)
    control.send(elapsed_s=0.0, found_nonfinite=torch.zeros(()))
    state = control.receive(step=1, elapsed_s=45.0)
    assert state == (ControlSignal.STOP, 0.75, False)
    assert checkpoints.num_advances == 1
