"""Training stage of the masked language model, through the training loop."""

import json
from pathlib import Path

import pytest
import safetensors.numpy
import torch
from small_models import save_tokenizer

from bsq_ray import Generator
from bsq_ray.config import load_config
from bsq_ray.data.factory import build_source
from bsq_ray.data.stream import evaluation_batches
from bsq_ray.data.tokenize import tokenize
from bsq_ray.training.eval_loop import evaluation_mode
from bsq_ray.training.launch import train
from bsq_ray.training.stages.masked_lm_stage import MaskedLMStage

SMALL = [
    "model.grid=[1,4,4]",
    "model.bits=10",
    "model.sub_bits=5",
    "model.num_classes=1",
    "model.width=32",
    "model.layers=2",
    "model.heads=2",
    "model.dropout=0",
    "sampling.steps=3",
    "training.steps=8",
    "training.batch_size=16",
    "training.schedule.warmup_steps=0",
    "training.optimizer.base_learning_rate=0.05",
    "training.optimizer.kind=adamw",
    "training.engine.kind=deepspeed",
    "training.engine.precision=fp32",
    "training.ema_decay=0.5",
    "training.log_every=1",
    "training.checkpoint_every=4",
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
        load_config("masked-lm-demo", SMALL + list(overrides)),
        tokens,
        str(out),
        workers,
        on_record=records.append,
        **options,
    )
    return [record for record in records if record["kind"] == "training"]


def weights(out):
    return safetensors.numpy.load_file(Path(out) / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained_run(tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return run(tokens, out), out


def test_masked_lm_run_learns_and_exports_generator(trained_run):
    """A run lowers its loss and exports a generator with its tokenizer."""
    records, out = trained_run
    assert records[-1]["loss"] < records[0]["loss"]
    images = Generator.from_pretrained(str(out / "model")).generate([0, 0], steps=3)
    assert images.shape == (2, 3, 32, 32)
    assert list((out / "samples").glob("*.png"))
    evaluations = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(r["train/bits_per_token"] > 0 for r in evaluations if r["kind"] == "evaluation")


def test_masked_lm_two_workers_match_one_process(trained_run, tokens, tmp_path, ray_local):
    on_ray = run(tokens, tmp_path, 2, "training.engine.kind=ddp")
    local = run(tokens, tmp_path / "alone", 0, "training.engine.kind=ddp")
    assert [r["loss"] for r in on_ray] == pytest.approx([r["loss"] for r in local], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_masked_lm_zero_stages_match(trained_run, tokens, tmp_path, stage):
    records = run(tokens, tmp_path, 0, f"training.engine.zero_stage={stage}")
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in trained_run[0]], rel=1e-4)


def test_masked_lm_resumed_run_is_bit_identical(trained_run, tokens, tmp_path):
    run(tokens, tmp_path, 0, "training.steps=4", "training.schedule.final_factor=1")
    run(tokens, tmp_path, 0, "training.schedule.final_factor=1", resume=True)
    uninterrupted = tmp_path / "uninterrupted"
    run(tokens, uninterrupted, 0, "training.schedule.final_factor=1")
    resumed, expected = weights(tmp_path), weights(uninterrupted)
    assert all((resumed[name] == expected[name]).all() for name in expected)


def test_eval_every_does_not_change_training_with_dropout(tokens, tmp_path):
    """With dropout, a run that evaluates after every step takes the same steps as one that does not."""
    overrides = ["model.dropout=0.5", "training.steps=3", "training.schedule.final_factor=1"]
    often = run(tokens, tmp_path / "often", 0, *overrides, "training.eval_every=1", "training.sample_every=1")
    rarely = run(tokens, tmp_path / "rarely", 0, *overrides, "training.eval_every=100")
    assert [r["loss"] for r in often] == [r["loss"] for r in rarely]
    often_weights, rarely_weights = weights(tmp_path / "often"), weights(tmp_path / "rarely")
    assert all((often_weights[name] == rarely_weights[name]).all() for name in often_weights)


def test_evaluation_has_no_dropout_and_restores_mode():
    """Inside evaluation mode dropout is off; afterwards the mode and the random state are restored."""
    module, x = torch.nn.Dropout(0.5), torch.ones(64)
    before = torch.get_rng_state()
    with evaluation_mode([module]):
        assert torch.equal(module(x), x)
        torch.rand(3)
    assert module.training
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_masks_depend_on_key_and_step_only(tokens):
    """Masks depend on the sample's key and the step, not on the rest of the batch."""
    config = load_config("masked-lm-demo", [*SMALL, "model.mask_unit=sub_token", "loss.class_dropout=0.5"])
    source = build_source(config, tokens)
    stage = MaskedLMStage(config, source, torch.device("cpu"))
    [batch] = evaluation_batches(source, 40, limit=40)
    masked, dropped = stage._sample_masks(batch.keys, 3, 0.5)
    alone, _ = stage._sample_masks(batch.keys[5:6], 3, 0.5)
    assert torch.equal(masked[5:6], alone)
    assert not torch.equal(masked, stage._sample_masks(batch.keys, 4, 0.5)[0])
    assert 0.2 < dropped.float().mean() < 0.8
    # The mean of cos(π/2 · u) is 2/π; sub-tokens of one token may differ.
    assert masked.float().mean() == pytest.approx(2 / torch.pi, abs=0.1)
    assert not torch.equal(masked[..., 0], masked[..., 1])


def test_loss_options_change_loss(trained_run, tokens, tmp_path):
    for number, override in enumerate(
        ["loss.label_smoothing=0.5", "loss.class_dropout=1", "model.mask_unit=sub_token"]
    ):
        changed = run(tokens, tmp_path / str(number), 0, "training.steps=1", override)
        assert changed[0]["loss"] != trained_run[0][0]["loss"], override


def test_masked_lm_trains_and_generates_clips(held_out_video_shards, tmp_path):
    """A masked language model trains on clips and generates clips."""
    model = save_tokenizer(tmp_path / "tokenizer", 0, frames=4)
    tokenize(model, held_out_video_shards, str(tmp_path / "tokens"), num_workers=0)
    overrides = ["model.grid=[4,4,4]", "training.steps=2", "training.batch_size=2"]
    run(str(tmp_path / "tokens"), tmp_path / "run", 0, *overrides)
    generated = Generator.from_pretrained(str(tmp_path / "run" / "model")).generate([0], steps=2)
    assert generated.shape == (1, 3, 4, 32, 32)
    assert list((tmp_path / "run" / "samples").glob("*.png"))


def test_token_table_of_other_shape_raises(tokens, tmp_path):
    """A token table of another shape, or an incomplete one, is rejected before training starts."""
    with pytest.raises(ValueError, match=r"set model.grid=\[1, 4, 4\]"):
        train(load_config("masked-lm-demo", [*SMALL, "model.grid=[1,2,2]"]), tokens, str(tmp_path / "x"), 0)
    with pytest.raises(ValueError, match="is not a complete token table"):
        train(load_config("masked-lm-demo", SMALL), str(tmp_path), str(tmp_path / "x"), 0)


def test_run_rejects_tokens_of_other_tokenizer(trained_run, photo_shards, tmp_path):
    """A run accepts only tokens of the tokenizer it started with."""
    _, out = trained_run
    other_tokenizer = save_tokenizer(tmp_path / "other", 1)
    other = tokenize(other_tokenizer, photo_shards, str(tmp_path / "tokens"), num_workers=0, num_crops=2).table
    tokenizer_id = load_config(str(out / "model" / "config.yaml")).model.tokenizer
    assert tokenizer_id == Generator.from_pretrained(str(out / "model")).tokenizer.model_id
    with pytest.raises(ValueError, match=f"model.tokenizer was '{tokenizer_id}' and is '{other.info.tokenizer_id}'"):
        run(other.url, out, 0, resume=True)
    with pytest.raises(ValueError, match=f"the model requires tokenizer {other.info.tokenizer_id[:12]}"):
        run(other.url, tmp_path / "mixed", 0, held_out_url=training_table_url(out))


def training_table_url(out):
    """Return the URL of a run's token table from its model card."""
    [line] = [line for line in (out / "model" / "README.md").read_text().splitlines() if "trained on" in line]
    return line.split("|")[2].split()[0]
