"""Training on packed videos: equal results across engines, workers, gradient checkpointing and resuming."""

import pytest
import safetensors.numpy
from process_group import spawn_group
from small_runs import RecordingReporter, local_worker, small_spec, train_runs
from test_engine import assert_same_run

from bsq_ray import Tokenizer
from bsq_ray.training.launch import train
from bsq_ray.training.trainer import run_training

CLIPS = ["model.frames=4", "training.batch_size=8"]
RUNS = {
    "ddp": ["training.engine.kind=ddp"],
    "zero 1": [],
    "zero 3": ["training.engine.zero_stage=3"],
    "recomputed": ["model.gradient_checkpointing=true"],
}


@pytest.fixture(scope="module")
def runs(video_shards, tmp_path_factory):
    """(folder, records by name) of the same training on clips, on two workers and on one."""
    out = str(tmp_path_factory.mktemp("clips"))
    [two_workers, _] = spawn_group(
        2, train_runs, video_shards, out, {name: CLIPS + more for name, more in RUNS.items()}
    )
    one_worker = train_runs(0, 1, video_shards, out, {"alone": CLIPS + RUNS["ddp"]})
    return out, {**two_workers, **one_worker}


@pytest.mark.parametrize("name", ["zero 1", "zero 3", "recomputed", "alone"])
def test_clip_training_matches_across_engines(runs, name):
    """Every engine and number of workers takes the same training steps on clips."""
    assert_same_run(*runs, "ddp", name)


def test_clip_training_resumed_is_bit_identical(runs, video_shards):
    """A clip training that is stopped and resumed ends with the weights of an uninterrupted one."""
    out, _ = runs
    train_runs(0, 1, video_shards, out, {"resumed": CLIPS + RUNS["ddp"]}, stop_after={"resumed": 2})
    train_runs(0, 1, video_shards, out, {"resumed": CLIPS + RUNS["ddp"]})
    left, right = (
        safetensors.numpy.load_file(f"{out}/{name}/model/model.safetensors") for name in ("alone", "resumed")
    )
    for key, value in left.items():
        assert (value == right[key]).all(), key


@pytest.fixture(scope="module")
def images_and_clips(photo_shards, video_shards, tmp_path_factory):
    """A file with images and videos."""
    path = tmp_path_factory.mktemp("mixture") / "mixture.yaml"
    path.write_text(f"datasets: [{{url: {photo_shards}, weight: 1}}, {{url: {video_shards}, weight: 1}}]\n")
    return str(path)


def test_images_and_clips_train_in_one_run(images_and_clips, tmp_path):
    """Two workers take the steps of one on batches of both kinds, and a stopped run resumes bit-identically."""
    overrides = [*CLIPS, *RUNS["ddp"], "training.steps=6", "training.checkpoint_every=3"]
    runs, out = {"whole": overrides}, str(tmp_path)
    [two_workers, _] = spawn_group(2, train_runs, images_and_clips, out, {"two": overrides})
    whole = train_runs(0, 1, images_and_clips, out, runs)
    assert_same_run(out, {**two_workers, **whole}, "whole", "two")
    train_runs(0, 1, images_and_clips, out, {"resumed": overrides}, stop_after={"resumed": 3})
    resumed = train_runs(0, 1, images_and_clips, out, {"resumed": overrides})["resumed"]
    assert [record["loss"] for record in resumed] == [record["loss"] for record in whole["whole"][3:]]


def test_image_batches_that_change_groups_are_rejected(images_and_clips, tmp_path):
    """Groups of the discriminator are checked for images, too: four frames of a clip fill one, one image does not."""
    overrides = [*CLIPS, "training.micro_batch_size=1", "model.quantizer.entropy.codebook_weight=0"]
    run_config = small_spec(images_and_clips, tmp_path, overrides).config
    with pytest.raises(ValueError, match="groups of 1 for its minibatch standard deviation"):
        train(run_config, images_and_clips, str(tmp_path / "run"), 0)


def test_clip_discriminator_3d_trains(video_shards, tmp_path):
    """The 3D discriminator trains on clips, including the R1 penalty."""
    listener = RecordingReporter()
    overrides = [*CLIPS, "loss.adversarial.discriminator=stylegan2-3d", "training.steps=2"]
    run_training(small_spec(video_shards, tmp_path, overrides), local_worker(listener))
    assert [record["step"] for record in listener.training_records] == [1, 2]
    assert "r1" in listener.training_records[1]


@pytest.fixture(scope="module")
def image_model(photo_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("image")
    run_training(small_spec(photo_shards, out, ["training.steps=2"]), local_worker(RecordingReporter()))
    return str(out / "model")


def test_video_model_initializes_from_image_model(image_model, video_shards, tmp_path):
    """A video model initialized from an image model starts with the same PSNR per frame."""
    job = small_spec(video_shards, tmp_path, [*CLIPS, "training.eval_samples=1000"])
    first = []

    def on_record(record):
        if record["kind"] == "evaluation":
            first.append(record)

    train(job.config, video_shards, str(tmp_path), 0, init_url=image_model, on_record=on_record)
    # Before the first step every frame is the reconstruction of the image model.
    [batch] = eval_batches(job)
    image = Tokenizer.from_pretrained(image_model)
    assert first[0]["train/psnr"] == pytest.approx(psnr(image, batch), abs=1e-2)
    assert f"| initialized from | {image_model} |" in (tmp_path / "model" / "README.md").read_text()


def eval_batches(job):
    from bsq_ray.data.factory import build_source
    from bsq_ray.data.stream import evaluation_batches

    return list(evaluation_batches(build_source(job.config, job.data_url), 1000))


def psnr(image, batch):
    """Return the mean PSNR over frames in dB."""
    import torch

    from bsq_ray.data.transforms import to_float, to_uint8

    frames = batch.values_B.transpose(1, 2).flatten(0, 1)
    error = (to_uint8(image.reconstruct(to_float(frames))).float() - frames.float()).square().mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / error)).mean())


def test_init_model_incompatible_raises_before_start(image_model, video_shards, tmp_path):
    """An incompatible image model is rejected before anything is written."""
    job = small_spec(video_shards, tmp_path / "run", [*CLIPS, "model.quantizer.bits=12"])
    with pytest.raises(ValueError, match="model.quantizer.bits is 18 there and 12 here"):
        train(job.config, video_shards, str(tmp_path / "run"), 0, init_url=image_model)
    assert not (tmp_path / "run").exists()
