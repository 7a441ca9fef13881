"""Collectives and host reads of a training step of two workers, for every engine."""

import pytest
from process_group import spawn_group
from step_counts import count_steps
from test_engine import ENGINES

pytestmark = pytest.mark.benchmark
MUON = {"muon": [*ENGINES["ddp"], "training.optimizer.kind=muon"]}


def test_step_counts(photo_shards, tmp_path, record):
    """A step of generator and discriminator, between two log steps."""
    [counts, _] = spawn_group(2, count_steps, photo_shards, str(tmp_path), ENGINES | MUON, 4)
    for engine, by_caller in counts.items():
        totals = dict.fromkeys(("engine_collectives", "loop_collectives", "engine_reads", "loop_reads"), 0)
        for (kind, caller), number in by_caller.items():
            # The result of the exchange is read a step later, when it is ready.
            if (kind, caller) != ("read", "exchange"):
                part = {"engine": "engine", "loss": "loss"}.get(caller, "loop")
                totals[f"{part}_{kind}s"] = totals.get(f"{part}_{kind}s", 0) + number
        assert totals.pop("loss_collectives") == 1
        record("step-counts-cpu", engine.replace(" ", "-"), **totals)
