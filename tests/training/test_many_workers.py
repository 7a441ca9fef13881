"""512 workers, simulated in one process: what each one reads, sends and writes does not grow with their number."""

import statistics
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulated_workers import SimulatedGroup
from small_runs import small_spec

from bsq_ray import config
from bsq_ray.config.batch_split import split_batch
from bsq_ray.data.data_source import SampleBlock
from bsq_ray.data.order import Order, worker_positions
from bsq_ray.data.stream import evaluation_share
from bsq_ray.training.checkpoints.writer import CheckpointWriter, RunProgress, load_checkpoint, newest_progress
from bsq_ray.training.control_sync import ControlSync

MANY = 512
# 128,100 images in shards of 100, so that 33 batches of 4,096 pass the end of the first epoch.
SHARD_SIZES, BATCH = np.full(1281, 100), 4096


def make_order():
    return Order(SHARD_SIZES, seed=3, interleave=16, shuffle_block_size=512)


def test_order_of_512_workers_is_that_of_one():
    """Together the workers read exactly the samples of each global batch, also over the end of an epoch."""
    order, first, stop = make_order(), 30 * BATCH, 33 * BATCH
    expected = np.stack(order.at(np.arange(first, stop)))
    actual = np.empty_like(expected)
    for rank in range(MANY):
        positions_P = worker_positions(first, stop, BATCH, rank, MANY)
        actual[:, rank::MANY] = order.at(positions_P)
    assert np.array_equal(actual, expected)
    assert set(actual[0]) == {0, 1}


def test_order_costs_a_worker_the_same_in_any_group():
    """Time and memory of the next 256 samples of one worker, among 8 and among 512."""

    def cost(world_size):
        order, times = make_order(), []
        order.at(np.arange(8))
        tracemalloc.start()
        for chunk in range(5):
            first = chunk * 256 * world_size
            start = time.thread_time()
            order.at(np.arange(first, first + 256 * world_size, world_size, dtype=np.int64))
            times.append(time.thread_time() - start)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return min(times), peak_bytes

    (few_s, few_bytes), (many_s, many_bytes) = cost(8), cost(MANY)
    assert many_s < 10 * few_s + 0.05
    assert many_bytes < 4 * few_bytes + 2**20


@pytest.mark.parametrize("preset", ["imagenet128-bsq18", "imagenet128-masked-lm", "ucf101-bsq18"])
def test_split_batch_gives_512_workers_equal_shares(preset):
    """The shares add up to the batch of one worker, with and without accumulation."""
    for micro_batch_size in ("null", "4"):
        run = config.load_config(
            preset, [f"training.batch_size={8 * MANY}", f"training.micro_batch_size={micro_batch_size}"]
        )
        micro_batch, accumulation_steps = split_batch(run, MANY)
        assert micro_batch * accumulation_steps * MANY == 8 * MANY
    with pytest.raises(ValueError, match="cannot be shared evenly by 512 workers"):
        split_batch(config.load_config(preset, ["training.batch_size=256"]), MANY)


def test_evaluation_share_of_512_workers_covers_each_sample():
    """Each of 10,000 evaluation samples is read once, and all workers read equally many blocks."""

    def read_eval(samples):
        return SampleBlock(np.zeros((len(samples), 1)), np.zeros(len(samples)), [str(sample) for sample in samples])

    source = SimpleNamespace(num_samples=50_000, read_eval=read_eval)
    shares = [list(evaluation_share(source, 8, 10_000, rank, MANY)) for rank in range(MANY)]
    keys = [int(key) for share in shares for block in share for key in block.keys]
    assert sorted(keys) == list(range(0, 50_000, 5))
    assert {len(share) for share in shares} == {3}


class IdleCheckpoints:
    """A checkpoint writer without a checkpoint in progress."""

    is_busy = False

    def advance(self):
        pass


def test_control_exchange_of_512_workers_stays_small(monkeypatch):
    """A worker contributes the same few bytes to one collective per step in any group, and its flag reaches all."""
    spec = small_spec("shards", "run", minutes=1.0)

    def steps(worker):
        control, states = ControlSync(spec, worker, IdleCheckpoints()), []
        for step in (1, 2, 3):
            found_nonfinite = torch.tensor(float(worker.rank == worker.world_size - 1 and step == 2))
            control.send(elapsed_s=30.0, found_nonfinite=found_nonfinite)
            states.append(tuple(control.receive(step, elapsed_s=30.0)))
        return states

    costs = {}
    for world_size in (8, MANY):
        group = SimulatedGroup(world_size)
        results, _ = group.run(steps, monkeypatch)
        assert results == [results[0]] * world_size
        assert [found_nonfinite for _, _, found_nonfinite in results[0]] == [False, True, False]
        costs[world_size] = {tuple(sizes) for sizes in group.message_bytes.values()}
    assert costs[8] == costs[MANY]
    [sizes] = costs[MANY]
    assert len(sizes) == 3
    assert max(sizes) <= 64


def write_checkpoint(folder, world_size, monkeypatch):
    """Write one checkpoint, a file of each worker; return the group and the CPU seconds of each worker's thread."""

    def write(worker):
        writer = CheckpointWriter(str(folder), worker, num_to_keep=1, timeout_s=0, on_published=lambda *_: None)
        progress = RunProgress(7, 7 * BATCH, 1.0, world_size, "hash", "config")
        content = f"state of worker {worker.rank}"
        writer.save(progress, {f"rng-{worker.rank}.pt": lambda path: path.write_text(content)})
        writer.wait()

    group = SimulatedGroup(world_size)
    return group, group.run(write, monkeypatch)[1]


def test_checkpoint_of_512_workers_has_one_complete_index(tmp_path, monkeypatch):
    """The index lists the file of every worker, and a worker's own cost is that in a small group."""
    few, few_s = write_checkpoint(tmp_path / "few", 8, monkeypatch)
    many, many_s = write_checkpoint(tmp_path / "many", MANY, monkeypatch)
    assert newest_progress(str(tmp_path / "many")).world == MANY
    (tmp_path / "loaded").mkdir()
    progress, warnings = load_checkpoint(str(tmp_path / "many"), tmp_path / "loaded")
    assert (progress.position, warnings) == (7 * BATCH, {})
    contents = {path.name: path.read_text() for path in (tmp_path / "loaded").iterdir()}
    assert contents == {f"rng-{rank}.pt": f"state of worker {rank}" for rank in range(MANY)}
    # The parts of a checkpoint are gathered twice, and each worker sends one description of its files.
    assert {len(sizes) for sizes in many.message_bytes.values()} == {len(few.message_bytes[0])}
    assert max(map(sum, many.message_bytes.values())) < 1.2 * max(map(sum, few.message_bytes.values()))
    assert statistics.median(many_s) < 10 * statistics.median(few_s) + 0.05
