"""Training with the discriminator on frozen features: all engines take the same steps, and runs resume exactly."""

import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from process_group import spawn_group
from small_runs import PRESET, SMALL, STEPS, RecordingReporter, local_worker, small_spec, train_runs
from test_engine import ENGINES, assert_same_run
from test_resume import assert_identical, assert_same_losses, comparable_values, load_weights

from bsq_ray.config import load_config
from bsq_ray.training.stages import build_stage
from bsq_ray.training.trainer import run_training

FEATURES = [
    # The last feature map of AlexNet has 2 x 2 positions.
    "model.image_size=48",
    "model.patch_size=16",
    "loss.adversarial.discriminator=features",
    "loss.adversarial.features=alex",
    "loss.adversarial.objective=hinge",
    "loss.adversarial.r1_gamma=1",
    # AdamW magnifies the rounding of tiny gradients, such as those of channels that are nearly dead.
    "training.optimizer.eps=1e-5",
]
RUNS = {name: [*overrides, *FEATURES] for name, overrides in ENGINES.items() if name != "zero 2 offloaded"}
RESUMED = ("ddp", "zero 1", "zero 3")
HALF = STEPS // 2


@pytest.fixture(scope="module")
def runs(photo_shards, tmp_path_factory):
    """(folder, losses by name) of two workers; some runs were stopped, and resumed by two workers or by one."""
    out = str(tmp_path_factory.mktemp("features"))
    stopped = {f"{name} resumed": RUNS[name] for name in RESUMED}
    [losses, _] = spawn_group(2, train_runs, photo_shards, out, RUNS | stopped, dict.fromkeys(stopped, HALF))
    for name in RESUMED:
        shutil.copytree(f"{out}/{name} resumed", f"{out}/{name} alone")
    [resumed, _] = spawn_group(2, train_runs, photo_shards, out, stopped)
    alone = train_runs(0, 1, photo_shards, out, {f"{name} alone": RUNS[name] for name in RESUMED})
    for name in stopped:
        losses[name] = losses[name] + resumed[name]
    return out, losses | alone


@pytest.mark.parametrize("engine", [name for name in RUNS if name != "ddp"])
def test_feature_steps_of_deepspeed_match_ddp(runs, engine):
    """Losses, gradient norms, weights and estimates of spectral norms are those of plain data parallelism."""
    assert_same_run(*runs, "ddp", engine)
    assert ["r1" in record for record in runs[1][engine]] == [False, True, False, True]


@pytest.mark.parametrize("engine", RESUMED)
def test_resumed_feature_training_is_bit_identical(runs, engine):
    out, losses = runs
    resumed, expected = ([comparable_values(r) for r in losses[name]] for name in (f"{engine} resumed", engine))
    assert resumed == expected
    assert_identical(load_weights(out, f"{engine} resumed"), load_weights(out, engine))


@pytest.mark.parametrize("engine", RESUMED)
def test_feature_training_resumes_on_other_world_size(runs, engine):
    """One worker continues what two workers started; the estimates of spectral norms are in the checkpoint."""
    out, losses = runs
    assert_same_losses(losses[f"{engine} alone"], losses[engine][HALF:], 1e-5)
    weights, expected = (
        safetensors.numpy.load_file(f"{out}/{name}/model/discriminator.safetensors")
        for name in (f"{engine} alone", engine)
    )
    for key in expected:
        np.testing.assert_allclose(weights[key], expected[key], atol=1e-5, err_msg=key)


@pytest.mark.parametrize("engine", RESUMED)
def test_published_discriminator_contains_heads_only(runs, engine):
    """--init reads the published discriminator, which has no weights of the frozen network."""
    url = f"{runs[0]}/{engine}/model"
    published = safetensors.numpy.load_file(f"{url}/discriminator.safetensors")
    assert all(key.startswith("heads.") for key in published)
    run_config = load_config(PRESET, [*SMALL, *FEATURES])
    stage = build_stage(run_config, None, torch.device("cpu"), url)
    assert not stage.notes
    state = stage.modules["discriminator"].state_dict()
    assert published.keys() == state.keys()
    assert all(np.array_equal(value.numpy(), published[key]) for key, value in state.items())


def test_init_with_other_frozen_network_trains_new_heads(runs, photo_shards, tmp_path):
    reporter = RecordingReporter()
    overrides = [*RUNS["ddp"], "training.steps=1", "loss.adversarial.features=vgg"]
    spec = small_spec(photo_shards, tmp_path, overrides, init_url=f"{runs[0]}/ddp/model")
    run_training(spec, local_worker(reporter))
    [warning] = [record["text"] for record in reporter.records if record["kind"] == "warning"]
    assert "has another architecture, so a new one is trained" in warning
