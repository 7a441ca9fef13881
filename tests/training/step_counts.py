"""Collectives and host reads of one training step, by the part of the program that causes them.

`torch.distributed` dispatches its collectives as operators, as `Tensor.item` and `float(tensor)` do, so one dispatch
mode sees all of them. `tolist`, `numpy` and `cpu` are no operators on a CPU, and are counted as methods.
"""

import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from small_runs import RecordingReporter, small_spec
from torch.utils._python_dispatch import TorchDispatchMode

from bsq_ray.training.trainer import Trainer, run_training
from bsq_ray.training.worker_context import WorkerContext

# By a part of the file name, innermost call first; everything else is the training loop.
CALLERS = {
    "training/deferred_max.py": "exchange",
    "training/engines/": "engine",
    "models/quantizers/entropy.py": "loss",
    "losses/": "loss",
}
READING_METHODS = ("tolist", "numpy", "cpu")
QUIET = [
    "loss.adversarial.r1_every=16",
    "training.eval_samples=1",
    "training.engine.precision=fp32",
]


class OperatorCounter(TorchDispatchMode):
    """Counts operators by step; a step ends where the next one starts. A subclass implements `observe`."""

    def __init__(self):
        super().__init__()
        self.step, self.by_step = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.observe(function, args)
        return function(*args, **(kwargs or {}))

    def count(self, name, amount=1):
        self.by_step.setdefault(self.step, Counter())[name] += amount

    @contextmanager
    def counting(self):
        """Count the steps of all trainers within the context."""
        train_step = Trainer.train_step

        def next_step(trainer, *arguments, **settings):
            self.step += 1
            return train_step(trainer, *arguments, **settings)

        with mock.patch.object(Trainer, "train_step", next_step), self:
            yield


class StepCounter(OperatorCounter):
    """Counts ("collective" or "read", caller)."""

    def observe(self, function, args):
        if function.namespace == "c10d":
            self.count(("collective", _caller()))
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count(("read", _caller()))

    @contextmanager
    def counting(self):
        """Count the steps, and reads by methods too, of all trainers within the context."""
        with ExitStack() as stack:
            for name in READING_METHODS:
                stack.enter_context(mock.patch.object(torch.Tensor, name, self._reading(name)))
            stack.enter_context(super().counting())
            yield

    def _reading(self, name):
        method = getattr(torch.Tensor, name)

        def read(tensor, *arguments, **settings):
            # Threads that read samples use these methods too.
            if threading.current_thread() is threading.main_thread():
                self.count(("read", _caller()))
            return method(tensor, *arguments, **settings)

        return read


def _caller():
    frame = sys._getframe(1)
    while frame is not None:
        for part, caller in CALLERS.items():
            if f"bsq_ray/{part}" in frame.f_code.co_filename:
                return caller
        frame = frame.f_back
    return "loop"


def count_steps(rank, world_size, shards, out, runs, step=2):
    """Return the counts of a step between two log steps, by name of the run, as {(kind, caller): number}.

    Args:
        step: number of the step. ZeRO 3 records the order of the parameters in the first ones.
    """
    steps = [f"training.{key}={step + 2}" for key in ("steps", "log_every")]
    counts = {}
    for name, overrides in runs.items():
        counter = StepCounter()
        with counter.counting():
            run_training(
                small_spec(shards, f"{out}/{name}", [*QUIET, *steps, *overrides]),
                WorkerContext(rank, world_size, torch.device("cpu"), "local", RecordingReporter()),
            )
        counts[name] = dict(counter.by_step.get(step, {}))
    return counts
