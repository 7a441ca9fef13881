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
# Times that an operator sends (N - 1)/N of its larger argument around a ring of N workers.
_RING_PASSES = {"allreduce_": 2, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1, "reduce_": 1}
_ACCUMULATED, _BF16 = "micro_batch_size=4", "engine.communication_data_type=bf16"
ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "ddp in bf16": ["engine.kind=ddp", _BF16],
    "ddp with Muon": ["engine.kind=ddp", "optimizer.kind=muon"],
    "ZeRO-0": ["engine.zero_stage=0"],
    "ZeRO-0 in bf16": ["engine.zero_stage=0", _BF16],
    "ZeRO-1": ["engine.zero_stage=1"],
    "ZeRO-1 in bf16": ["engine.zero_stage=1", _BF16],
    "ZeRO-1 accumulated": ["engine.zero_stage=1", _ACCUMULATED],
    "ZeRO-1 offloaded": ["engine.zero_stage=1", "engine.offload_optimizer=true"],
    "ZeRO-2": ["engine.zero_stage=2"],
    "ZeRO-2 accumulated": ["engine.zero_stage=2", _ACCUMULATED],
    "ZeRO-2 accumulated in bf16": ["engine.zero_stage=2", _ACCUMULATED, _BF16],
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
    """Counts the bytes of the larger argument of each collective: its input or its output."""

    def observe(self, function, args):
        if function.namespace == "c10d":
            self.count(function._opname, max(map(num_bytes, args[:2])))


def count_traffic(rank, world_size, shards, out, engines):
    """Return by engine the bytes of each collective of a step between two log steps."""
    by_engine = {}
    for name, overrides in engines.items():
        counter = TrafficCounter()
        worker = WorkerContext(rank, world_size, torch.device("cpu"), "local", RecordingReporter())
        with counter.counting():
            run_training(small_spec(shards, f"{out}/{name}", [*_OVERRIDES, *overrides]), worker)
        by_engine[name] = dict(counter.by_step[_STEP])
    return by_engine


def overrides_of(engine):
    return [f"training.{override}" for override in ENGINES[engine]]


@pytest.fixture(scope="module")
def sent_bytes(photo_shards, tmp_path_factory):
    """Bytes that a worker sends in a step, by engine."""
    engines = {name: overrides_of(name) for name in ENGINES}
    counted = spawn_group(2, count_traffic, photo_shards, str(tmp_path_factory.mktemp("traffic")), engines)[0]
    return {
        name: sum(_RING_PASSES[operator] * size / 2 for operator, size in counts.items())
        for name, counts in counted.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_traffic_of_a_step_is_that_of_the_planner(sent_bytes, engine):
    run = small_spec("", "run", overrides_of(engine)).config
    num_parameters = sum(sample_requirements(run).parameters.values())
    planned_bytes = communication_bytes(num_parameters, run.training.engine, 2, accumulation_steps=2)
    planned_bytes += muon_communication_bytes(num_muon_elements(run), 2, half=False)
    assert sent_bytes[engine] == pytest.approx(planned_bytes, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [name for name in ENGINES if name.startswith(("ZeRO-1", "ZeRO-2"))])
def test_zero_sends_no_more_than_data_parallelism(sent_bytes, engine):
    """Partitioned optimizer state costs no traffic: a reduce-scatter and an all-gather are an all-reduce."""
    assert sent_bytes[engine] <= 1.05 * sent_bytes["ddp"]


@pytest.mark.slow
def test_bf16_halves_the_bytes_of_gradients(sent_bytes):
    assert sent_bytes["ddp in bf16"] == pytest.approx(sent_bytes["ddp"] / 2, rel=0.05)
    # ZeRO-1 gathers the weights in fp32.
    assert sent_bytes["ZeRO-1 in bf16"] == pytest.approx(sent_bytes["ZeRO-1"] * 3 / 4, rel=0.05)
