"""Training on crops of several sizes: every size is trained, and runs are exact after a stop and on two workers."""

import json

import pytest
import torch
from process_group import spawn_group
from small_runs import RecordingReporter, local_worker, small_spec, train_runs
from test_resume import assert_identical, assert_same_losses, load_weights

from bsq_ray import Tokenizer
from bsq_ray.config import load_config
from bsq_ray.training.launch import train
from bsq_ray.training.trainer import run_training

# 16 tokens each, in the patches of 4 pixels of the small runs.
SIZES = ["model.position=rotary", "model.position_period=2", "data.crop_sizes=[[16, 16], [8, 32], [32, 8]]"]
RUNS = {
    "without GAN": [*SIZES, "loss.adversarial.weight=0"],
    "patchgan": [*SIZES, "loss.adversarial.discriminator=patchgan", "data.crop_sizes=[[48, 48], [96, 24], [24, 96]]",
                 "model.image_size=48"],
    "bit noise": [*SIZES, "loss.adversarial.weight=0", "training.bit_noise.images=0.5"],
}  # fmt: skip
CLIPS = ["model.frames=3", "model.attention_radius=1", "training.batch_size=8"]
CLIP_RUNS = {f"clips, {name}": [*overrides, *CLIPS] for name, overrides in RUNS.items()}
TOLERANCE = 2e-4


@pytest.mark.parametrize("name", [*RUNS, *CLIP_RUNS])
def test_run_stopped_at_half_ends_with_the_same_weights(name, photo_shards, video_shards, tmp_path):
    whole, stopped, resumed = RecordingReporter(), RecordingReporter(stop_after=2), RecordingReporter()
    shards, overrides = (video_shards, CLIP_RUNS[name]) if name in CLIP_RUNS else (photo_shards, RUNS[name])
    run_training(small_spec(shards, tmp_path / "whole", overrides), local_worker(whole))
    run_training(small_spec(shards, tmp_path / "stopped", overrides), local_worker(stopped))
    run_training(small_spec(shards, tmp_path / "stopped", overrides), local_worker(resumed))
    assert [record["step"] for record in resumed.training_records] == [3, 4]
    assert_identical(load_weights(tmp_path, "whole"), load_weights(tmp_path, "stopped"))


def test_resume_with_other_sizes_raises(photo_shards, tmp_path):
    """Batches after the stop would be others than those of an uninterrupted run."""
    runs = RUNS["without GAN"], [*RUNS["without GAN"], "data.crop_sizes=[[16, 16], [32, 8]]"]
    reporter = RecordingReporter(stop_after=2)
    run_training(small_spec(photo_shards, tmp_path / "run", runs[0]), local_worker(reporter))
    with pytest.raises(ValueError, match="data.crop_sizes was .* and is .*use the same values"):
        run_training(small_spec(photo_shards, tmp_path / "run", runs[1]), local_worker(reporter))


def test_two_workers_train_as_one(photo_shards, tmp_path):
    losses = train_runs(0, 1, photo_shards, str(tmp_path / "one"), RUNS)
    [pair, _] = spawn_group(2, train_runs, photo_shards, str(tmp_path / "two"), RUNS)
    for name in RUNS:
        assert_same_losses(pair[name], losses[name], TOLERANCE)


def test_two_workers_train_on_clips_as_one(video_shards, tmp_path):
    losses = train_runs(0, 1, video_shards, str(tmp_path / "one"), CLIP_RUNS)
    [pair, _] = spawn_group(2, train_runs, video_shards, str(tmp_path / "two"), CLIP_RUNS)
    for name in CLIP_RUNS:
        assert_same_losses(pair[name], losses[name], TOLERANCE)


def test_preset_trains_on_three_sizes_and_encodes_them(photo_shards, held_out_shards, tmp_path):
    """The preset shrunk: it learns, the evaluation is that of squares, and the model takes all sizes."""
    small = ["model.encoder={width: 32, layers: 1, heads: 2}", "training.batch_size=8", "training.steps=60"]
    small += ["model.decoder={width: 32, layers: 1, heads: 2, head_hidden_dim: 64}", "training.log_every=1"]
    sizes = "data.crop_sizes=[[64, 64], [48, 88], [88, 48]]"
    small += ["training.schedule.warmup_steps=10", "training.ema_decay=0.9"]
    run_config = load_config("demo-any-size", [*small, sizes, "training.eval_every=60", "training.sample_every=60"])
    train(run_config, photo_shards, str(tmp_path / "run"), 0, held_out_url=held_out_shards)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (record["held_out/perceptual"] for record in records if "held_out/perceptual" in record)
    assert last < 0.85 * first
    tokenizer = Tokenizer.from_pretrained(str(tmp_path / "run" / "model"))
    for height, width in ((64, 64), (48, 88), (88, 48)):
        tokens = tokenizer.encode(torch.zeros(1, 3, height, width))
        assert tokens.grid == (1, height // 8, width // 8)
        assert tokenizer.decode(tokens).shape == (1, 3, height, width)
