"""Nested dropout: the number of bits that each sample keeps, and runs that train with it."""

import shutil

import numpy as np
import pytest
import torch
from process_group import spawn_group
from small_runs import STEPS, train_runs

from bsq_ray import Tokenizer
from bsq_ray.training.stages.nested_dropout import NestedDropout, sample_num_kept

KEEP = (6, 9, 12, 18)
NESTED = ["model.quantizer.keep=[6,9,12,18]"]
RUNS = {
    "ddp": [*NESTED, "training.engine.kind=ddp"],
    "zero 1": [*NESTED, "training.engine.zero_stage=1"],
    "zero 3": [*NESTED, "training.engine.zero_stage=3"],
}


def test_half_of_samples_keep_all_bits():
    """All bits have probability 1/2, the other numbers share the rest evenly."""
    kept_B = sample_num_kept(KEEP, 0, 0, 60_000)
    shares = [(kept_B == number).mean() for number in KEEP]
    assert shares == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2], abs=0.01)
    assert (sample_num_kept((9, 18), 0, 0, 10_000) == 18).mean() == pytest.approx(0.5, abs=0.02)


def test_samples_depend_on_seed_step_and_position_only():
    assert (sample_num_kept(KEEP, 1, 5, 100)[:50] == sample_num_kept(KEEP, 1, 5, 50)).all()
    assert (sample_num_kept(KEEP, 1, 5, 100) != sample_num_kept(KEEP, 1, 6, 100)).any()
    assert (sample_num_kept(KEEP, 1, 5, 100) != sample_num_kept(KEEP, 2, 5, 100)).any()


def own_samples(rank, world_size, across_workers):
    """Kept bits and shares of this worker's two micro batches of a global batch of 8."""
    dropout = NestedDropout(KEEP, 0, across_workers)
    parts = dropout.sample([4 // world_size] * 2, 3, torch.device("cpu"))
    return [(part.num_kept_B.tolist(), part.share_L.tolist()) for part in parts]


def test_micro_batches_and_workers_split_batch_by_stride():
    kept = sample_num_kept(KEEP, 0, 3, 8).tolist()
    expected_share = [np.mean([number > bit for number in kept]) for bit in range(18)]
    [one] = [own_samples(0, 1, True)]
    assert [part[0] for part in one] == [kept[0::2], kept[1::2]]
    two = spawn_group(2, own_samples, True)
    assert [[part[0] for part in parts] for parts in two] == [[kept[0::4], kept[2::4]], [kept[1::4], kept[3::4]]]
    for parts in (one, *two):
        for _, share in parts:
            assert share == pytest.approx(expected_share)
    # Without across_workers the shares are those of the worker's own samples.
    for rank, parts in enumerate(spawn_group(2, own_samples, False)):
        own = kept[rank::2]
        assert parts[0][1] == pytest.approx([np.mean([number > bit for number in own]) for bit in range(18)])


def comparable(records):
    return [
        {key: record[key] for key in record if key.startswith(("loss", "grad_norm", "quant"))} for record in records
    ]


def train_all(rank, world_size, shards, out):
    """Train the uninterrupted runs, and one that is stopped at half and resumed; return the records by name."""
    stopped = {"stopped": RUNS["ddp"]}
    first_half = train_runs(rank, world_size, shards, out, stopped, {"stopped": STEPS // 2})
    second_half = train_runs(rank, world_size, shards, out, stopped)
    assert [record["step"] for record in second_half["stopped"]] == [STEPS // 2 + 1, STEPS]
    records = train_runs(rank, world_size, shards, out, RUNS)
    return records | {"stopped": first_half["stopped"] + second_half["stopped"]}


@pytest.fixture(scope="module")
def runs(photo_shards, tmp_path_factory):
    """Folder, and training records by run."""
    out = str(tmp_path_factory.mktemp("nested"))
    [records] = spawn_group(1, train_all, photo_shards, out)
    return out, records


@pytest.mark.parametrize("engine", ["zero 1", "zero 3"])
def test_engines_take_same_nested_steps(runs, engine):
    for left, right in zip(comparable(runs[1][engine]), comparable(runs[1]["ddp"]), strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-5)


def test_resumed_nested_run_is_bit_identical(runs):
    assert comparable(runs[1]["stopped"]) == comparable(runs[1]["ddp"])


def test_nested_model_folder_decodes_every_prefix(runs, tmp_path):
    shutil.copytree(f"{runs[0]}/ddp/model", tmp_path / "model")
    tokenizer = Tokenizer.from_pretrained(str(tmp_path / "model"))
    images_BCHW = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = tokenizer.encode(images_BCHW)
    assert tokens.bits_BNL.shape == (2, 16, 18)
    assert torch.equal(tokenizer.decode(tokens.first(18)), tokenizer.reconstruct(images_BCHW))
    previous = None
    for num_bits in (1, 6, 12, 17):
        decoded = tokenizer.decode(tokens.first(num_bits))
        assert decoded.shape == images_BCHW.shape
        assert previous is None or not torch.equal(decoded, previous)
        previous = decoded
