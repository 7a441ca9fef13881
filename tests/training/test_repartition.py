"""Partitions of ZeRO for another number of workers: their elements, the files they need, and real checkpoints."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from process_group import spawn_group

from bsq_ray import Tokenizer
from bsq_ray.config import load_config
from bsq_ray.runtime._zero_checkpoint_internals import FlatGroup
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.engines.repartition import part_size, repartition, repartition_groups, source_ranks


def partition(group, rank, world_size):
    """Return a rank's flat tensor of a group whose elements are 1, 2, …; padding is 0."""
    parts, first = [], 1
    for segment in group.segments:
        size = part_size(segment, group.alignment, world_size)
        padded = torch.zeros(size * world_size, dtype=torch.int64)
        padded[:segment] = torch.arange(first, first + segment)
        parts.append(padded[rank * size : (rank + 1) * size])
        first += segment
    return torch.cat(parts)


WORLD_SIZES = st.integers(1, 9)
GROUPS = st.builds(
    FlatGroup, st.lists(st.integers(1, 50), min_size=1, max_size=5).map(tuple), st.sampled_from([1, 2, 4])
)


@given(GROUPS, WORLD_SIZES, WORLD_SIZES)
def test_repartition_equals_direct_partition(group, old_world_size, world_size):
    """From the partitions of its sources alone, each rank gets what a checkpoint of as many workers would contain."""
    for rank in range(world_size):
        old_ranks = source_ranks([group], rank, old_world_size, world_size)
        sources = {old: {"values": partition(group, old, old_world_size)} for old in old_ranks}
        result = repartition(group, rank, old_world_size, world_size, sources)["values"]
        assert result.tolist() == partition(group, rank, world_size).tolist()


def test_repartition_groups_of_other_number_raises():
    """ZeRO-3 divides a group above a billion elements per worker further, so the number depends on the workers."""
    group = FlatGroup((8,), 1)
    sources = {rank: [{"values": partition(group, rank, 2)}] * 2 for rank in range(2)}
    with pytest.raises(
        ValueError, match="has 2 parameter groups, but a rank of 1 workers has 1; resume with 2 workers"
    ):
        repartition_groups([group], 0, 2, 1, sources)


@given(st.integers(1, 10**9), st.integers(1, 600), st.integers(1, 600), st.data())
def test_source_ranks_of_flat_group_are_few(segment, old_world_size, world_size, data):
    """A rank of ZeRO-1 reads its share of the old partitions, and at most one more at each end."""
    rank = data.draw(st.integers(0, world_size - 1))
    old_ranks = source_ranks([FlatGroup((segment,), 2)], rank, old_world_size, world_size)
    old_size, size = (part_size(segment, 2, number) for number in (old_world_size, world_size))
    assert 1 <= len(old_ranks) <= math.ceil(size / old_size) + 1
    assert old_ranks <= set(range(old_world_size))


@pytest.mark.parametrize(
    ("old_world_size", "world_size", "zero_1", "zero_3"),
    [(64, 16, 33, 34), (16, 64, 3, 6), (64, 56, 10, 19), (512, 64, 64, 181)],
)
def test_node_reads_part_of_large_checkpoint(old_world_size, world_size, zero_1, zero_3):
    """Number of old partitions of the paper's model for a node of eight workers.

    ZeRO-3 divides each parameter alone. Biases have fewer elements than 512 workers, so that their owners are others
    than those of large matrices.
    """
    with torch.device("meta"):
        tokenizer = Tokenizer(load_config("imagenet128-bsq18").model)
    segments = tuple(parameter.numel() for parameter in tokenizer.parameters())
    for group, expected in ((FlatGroup((sum(segments),), 2), zero_1), (FlatGroup(segments, 1), zero_3)):
        by_node = [
            set().union(*(source_ranks([group], first + i, old_world_size, world_size) for i in range(8)))
            for first in range(0, world_size, 8)
        ]
        assert max(map(len, by_node)) == expected


STAGES = (1, 2, 3)
NUM_FROZEN = 1


def build(stage, seed):
    """Build an engine of a module with odd numbers of elements, one layer of which is not trained."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 7), torch.nn.Linear(7, 2))
    module[NUM_FROZEN].requires_grad_(False)
    overrides = [f"training.engine.zero_stage={stage}"]
    training_config = load_config("demo-gan", overrides).training
    return build_engine(module, training_config, micro_batch=1, accumulation_steps=1, device=torch.device("cpu"))


def take_step(engine):
    engine.backward(engine(torch.linspace(-1, 1, 5)[None]).square().sum())
    engine.step(1e-2)


def write_snapshot(engine, folder):
    for name, write in engine.snapshot().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name)


def weights_of(engine):
    with engine.gathered_parameters():
        return {name: value.detach().numpy().copy() for name, value in engine.module.named_parameters()}


def train_and_save(rank, world_size, folder):
    """Take two steps and save; return by stage the weights, and those after a third step."""
    results = {}
    for stage in STAGES:
        engine = build(stage, seed=0)
        for _ in range(2):
            take_step(engine)
        write_snapshot(engine, Path(folder) / str(stage))
        saved = weights_of(engine)
        take_step(engine)
        results[stage] = saved, weights_of(engine)
    return results


def load_and_train(rank, world_size, folder, old_world_size):
    """Load into other weights with a node of its own, after removing the files that it does not load.

    Returns:
        by stage the names of the loaded files, the weights, and those after a step.
    """
    results = {}
    for stage in STAGES:
        engine = build(stage, seed=1)
        own = Path(folder) / f"{stage} {world_size} {rank}"
        loaded = []
        for path in sorted((Path(folder) / str(stage)).rglob("*.*")):
            name = path.relative_to(Path(folder) / str(stage)).as_posix()
            if engine.loads_file(name, [rank], old_world_size):
                (own / name).parent.mkdir(parents=True, exist_ok=True)
                (own / name).write_bytes(path.read_bytes())
                loaded.append(name)
        engine.repartition(own, [rank], old_world_size)
        engine.load(own, same_world_size=False)
        weights = weights_of(engine)
        take_step(engine)
        results[stage] = loaded, weights, weights_of(engine)
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, weights by stage) of a checkpoint of two workers."""
    folder = str(tmp_path_factory.mktemp("saved"))
    return folder, spawn_group(2, train_and_save, folder)[0]


@pytest.fixture(scope="module", params=[1, 3])
def loaded(request, saved):
    """(number of workers, by rank and stage: files, weights) of the same checkpoint."""
    return request.param, spawn_group(request.param, load_and_train, saved[0], 2)


@pytest.mark.parametrize("stage", STAGES)
def test_other_number_of_workers_continues_with_same_weights(saved, loaded, stage):
    """Weights, also those not trained, are bit-identical after loading, and the optimizer takes the same next step."""
    expected, expected_next = saved[1][stage]
    for results in loaded[1]:
        _, weights, next_weights = results[stage]
        for name, value in expected.items():
            assert np.array_equal(weights[name], value), name
            np.testing.assert_allclose(next_weights[name], expected_next[name], rtol=1e-6, atol=1e-7)
        assert any(not np.array_equal(next_weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("stage", STAGES)
def test_other_number_of_workers_loads_only_needed_files(loaded, stage):
    """The outer ones of three workers load the partition of one old rank."""
    world_size, by_rank = loaded
    ranks = [
        sorted({int(name.split("zero_pp_rank_")[1][0]) for name in results[stage][0] if "zero_pp_rank_" in name})
        for results in by_rank
    ]
    if world_size == 1:
        assert ranks == [[0, 1]]
    else:
        assert ranks[0] == [0]
        assert ranks[2] == [1]
