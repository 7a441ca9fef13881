"""A step between two log steps: one collective besides those of gradients and loss, and no host read."""

import pytest
from process_group import spawn_group
from step_counts import count_steps
from test_engine import ENGINES

MUON = [*ENGINES["ddp"], "training.optimizer.kind=muon", "training.optimizer.max_grad_norm=0.01"]
COUNTED = {"ddp": ENGINES["ddp"], "muon": MUON, "zero 1": ENGINES["zero 1"]}


@pytest.fixture(scope="module")
def counts(photo_shards, tmp_path_factory):
    """Counts of a step of two workers, by engine."""
    return spawn_group(2, count_steps, photo_shards, str(tmp_path_factory.mktemp("counts")), COUNTED)


@pytest.mark.parametrize("engine", COUNTED)
def test_step_exchanges_once_and_reads_nothing(counts, engine):
    """The exchange is the only collective of the loop, and its result the only value that the host reads."""
    for by_caller in (rank_counts[engine] for rank_counts in counts):
        assert by_caller["collective", "exchange"] == by_caller["read", "exchange"] == 1
        assert not by_caller.keys() & {("collective", "loop"), ("read", "loop"), ("read", "engine"), ("read", "loss")}


def test_ddp_step_has_one_collective_per_module(counts):
    """Generator and discriminator average their gradients with one collective each."""
    assert counts[0]["ddp"]["collective", "engine"] == 2
