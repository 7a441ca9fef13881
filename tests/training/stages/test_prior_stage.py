"""Training stage of the prior: its loss is the coding cost."""

import pytest
import safetensors.numpy
from small_models import save_tokenizer

from bsq_ray import Codec
from bsq_ray.config import load_config
from bsq_ray.data.tokenize import tokenize
from bsq_ray.training.launch import train

SMALL = [
    "model.grid=[1,4,4]",
    "model.bits=10",
    "model.sub_bits=5",
    "model.width=32",
    "model.layers=2",
    "model.heads=2",
    "model.dropout=0",
    "training.steps=20",
    "training.batch_size=16",
    "training.schedule.warmup_steps=0",
    "training.optimizer.base_learning_rate=0.1",
    "training.optimizer.kind=adamw",
    "training.engine.kind=deepspeed",
    "training.engine.precision=fp32",
    "training.ema_decay=0.5",
    "training.log_every=1",
]


@pytest.fixture(scope="module")
def tokens(photo_shards, tmp_path_factory):
    model = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 0)
    url = str(tmp_path_factory.mktemp("tokens"))
    tokenize(model, photo_shards, url, num_workers=0, num_crops=2)
    return url


def run(tokens, out, workers=0, *overrides, **options):
    records = []
    train(
        load_config("prior-demo", SMALL + list(overrides)),
        tokens,
        str(out),
        workers,
        on_record=records.append,
        **options,
    )
    return [record for record in records if record["kind"] == "training"]


def test_prior_run_learns_and_exports_codec(tokens, tmp_path, photos):
    """A run lowers its loss and exports a codec with its tokenizer."""
    records = run(tokens, tmp_path)
    assert records[0]["bits_per_token"] == pytest.approx(10, abs=0.3), "nothing is known at first"
    assert records[-1]["bits_per_token"] < 8
    codec = Codec.from_pretrained(str(tmp_path / "model"))
    encoded = codec.compress(photos[0].resize((128, 128)))
    # Sixteen tiles of 16 tokens cost less than their raw bits under a trained model.
    assert encoded.cross_entropy_bits < 0.9 * encoded.raw_bits
    assert codec.decompress(encoded.data).size == (128, 128)


def test_prior_two_workers_match_one_process(tokens, tmp_path, ray_local):
    there = run(tokens, tmp_path / "two", 2)
    here = run(tokens, tmp_path / "one", 0)
    assert [r["loss"] for r in there] == pytest.approx([r["loss"] for r in here], rel=1e-4)


def test_prior_resumed_run_is_bit_identical(tokens, tmp_path):
    run(tokens, tmp_path / "a", 0, "training.steps=5", "training.schedule.final_factor=1")
    run(tokens, tmp_path / "a", 0, "training.schedule.final_factor=1", resume=True)
    run(tokens, tmp_path / "b", 0, "training.schedule.final_factor=1")
    resumed, unbroken = (safetensors.numpy.load_file(tmp_path / r / "model" / "model.safetensors") for r in "ab")
    assert all((resumed[name] == unbroken[name]).all() for name in unbroken)
