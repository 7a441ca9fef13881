"""Trainings on packed videos: engines, workers, recomputing and resuming change nothing, as with images."""

import pytest
import safetensors.numpy
from process_group import in_group
from small_runs import Listener, in_this_process, small_job, train_several
from test_engine import assert_same_run

from bsq_ray import Tokenizer
from bsq_ray.training.launch import train
from bsq_ray.training.trainer import run

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
    [two, _] = in_group(2, train_several, video_shards, out, {name: CLIPS + more for name, more in RUNS.items()})
    alone = train_several(0, 1, video_shards, out, {"alone": CLIPS + RUNS["ddp"]})
    return out, {**two, **alone}


@pytest.mark.parametrize("name", ["zero 1", "zero 3", "recomputed", "alone"])
def test_every_engine_and_number_of_workers_takes_the_same_steps_on_clips(runs, name):
    assert_same_run(*runs, "ddp", name)


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(runs, video_shards):
    out, _ = runs
    train_several(0, 1, video_shards, out, {"resumed": CLIPS + RUNS["ddp"]}, last={"resumed": 2})
    train_several(0, 1, video_shards, out, {"resumed": CLIPS + RUNS["ddp"]})
    left, right = (
        safetensors.numpy.load_file(f"{out}/{name}/model/model.safetensors") for name in ("alone", "resumed")
    )
    for key, value in left.items():
        assert (value == right[key]).all(), key


def test_a_discriminator_of_whole_clips_is_trained(video_shards, tmp_path):
    listener = Listener()
    overrides = [*CLIPS, "loss.adversarial.discriminator=stylegan2-3d", "training.steps=2"]
    run(small_job(video_shards, tmp_path, overrides), in_this_process(listener))
    assert [record["step"] for record in listener.training] == [1, 2]
    assert "r1" in listener.training[1]


@pytest.fixture(scope="module")
def image_model(photo_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("image")
    run(small_job(photo_shards, out, ["training.steps=2"]), in_this_process(Listener()))
    return str(out / "model")


def test_a_video_model_is_trained_from_an_image_model(image_model, video_shards, tmp_path):
    job = small_job(video_shards, tmp_path, CLIPS)
    first = []

    def show(record):
        if record["kind"] == "evaluation":
            first.append(record)

    train(job.config, video_shards, str(tmp_path), 0, init_url=image_model, show=show)
    # Before the first step every frame is what the image model makes of it.
    [batch] = evaluated(job)
    image = Tokenizer.from_pretrained(image_model)
    assert first[0]["psnr"] == pytest.approx(psnr(image, batch), abs=1e-2)
    assert f"| initialised from | {image_model} |" in (tmp_path / "model" / "README.md").read_text()


def evaluated(job):
    from bsq_ray.data.factory import build_source
    from bsq_ray.data.stream import evaluation_batches

    return list(evaluation_batches(build_source(job.config, job.data_url), 8, 8))


def psnr(image, batch):
    """Mean over frames."""
    import torch

    from bsq_ray.data.transforms import to_float, to_uint8

    frames = batch.values_B.transpose(1, 2).flatten(0, 1)
    error = (to_uint8(image.reconstruct(to_float(frames))).float() - frames.float()).square().mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / error)).mean())


def test_an_image_model_that_does_not_fit_is_refused_before_anything_starts(image_model, video_shards, tmp_path):
    job = small_job(video_shards, tmp_path / "run", [*CLIPS, "model.quantizer.bits=12"])
    with pytest.raises(ValueError, match="model.quantizer.bits is 18 there and 12 here"):
        train(job.config, video_shards, str(tmp_path / "run"), 0, init_url=image_model)
    assert not (tmp_path / "run").exists()
