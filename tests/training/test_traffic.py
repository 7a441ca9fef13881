"""Bytes that a worker sends in a step, counted over two workers: those of the planner's model."""

import pytest
import torch
from process_group import spawn_group
from small_runs import RecordingReporter, small_spec
from step_counts import OperatorCounter

from bsq_ray.planning.communication import communication_bytes, muon_communication_bytes
from bsq_ray.planning.memory import num_muon_elements
from bsq_ray.planning.requirements import sample_requirements
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import WorkerContext

_STEP = 3
# Times that an operator sends (N - 1)/N of its first argument around a ring of N workers.
_RING_PASSES = {"allreduce_": 2, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1, "reduce_": 1}
ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "ddp with Muon": ["engine.kind=ddp", "optimizer.kind=muon"],
    "ZeRO-0": ["engine.kind=deepspeed", "engine.zero_stage=0"],
    "ZeRO-1": ["engine.kind=deepspeed", "engine.zero_stage=1"],
    "ZeRO-2": ["engine.kind=deepspeed", "engine.zero_stage=2"],
}
_OVERRIDES = [
    "loss.adversarial.r1_every=16", "training.eval_samples=1", "training.engine.precision=fp32", "training.steps=4",
    "training.log_every=4",
]  # fmt: skip


def num_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(num_bytes, value)) if isinstance(value, list | tuple) else 0


class TrafficCounter(OperatorCounter):
    """Counts the bytes of the first argument of each collective."""

    def observe(self, function, args):
        if function.namespace == "c10d":
            self.count(function._opname, num_bytes(args[0]))


def traffic(rank, world_size, shards, out, overrides):
    """Return the bytes of each collective of a step between two log steps."""
    counter = TrafficCounter()
    worker = WorkerContext(rank, world_size, torch.device("cpu"), "local", RecordingReporter())
    with counter.counting():
        run_training(small_spec(shards, out, [*_OVERRIDES, *overrides]), worker)
    return dict(counter.by_step[_STEP])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_traffic_of_a_step_is_that_of_the_planner(photo_shards, tmp_path, engine):
    overrides = [f"training.{override}" for override in ENGINES[engine]]
    counted = spawn_group(2, traffic, photo_shards, str(tmp_path / "run"), overrides)[0]
    sent_bytes = sum(_RING_PASSES[name] * size / 2 for name, size in counted.items())
    run = small_spec(photo_shards, "run", overrides).config
    num_parameters = sum(sample_requirements(run).parameters.values())
    planned_bytes = communication_bytes(num_parameters, run.training.engine, 2, accumulation_steps=1)
    planned_bytes += muon_communication_bytes(num_muon_elements(run), 2, half=False)
    assert sent_bytes == pytest.approx(planned_bytes, rel=0.05)
