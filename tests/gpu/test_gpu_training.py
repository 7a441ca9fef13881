"""Training on a GPU: the losses of a CPU, the same steps by every engine, runs that stop and go on, also elsewhere."""

import json
import subprocess
import sys

import pytest
import torch
from small_runs import PRESET, SMALL, STEPS, RecordingReporter, small_job
from test_engine import ENGINES, UNCOMPARED, assert_same_run

from bsq_ray.training.checkpoints.writer import list_checkpoints
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import WorkerContext

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
PLAIN = ENGINES["ddp"]
# Otherwise gradients that are nothing but rounding move their weights as far as others do, each device its own way.
STEADY = ["training.optimizer.epsilon=1e-4"]
# The R1 penalty's second derivatives amplify the last digits.
RELATIVE = 2e-3


def train(device, shards, out, overrides=(), last=None):
    """The records of the steps; those of the runs of one folder go on from each other."""
    listener = RecordingReporter(last)
    run_training(small_job(shards, out, [*STEADY, *overrides]), WorkerContext(0, 1, device, "local", listener))
    return listener.training


def assert_close(found, expected, tolerance=RELATIVE):
    """Losses, entropies and gradient norms of each step."""
    for there, here in zip(found, expected, strict=True):
        assert there.keys() == here.keys()
        for key in here.keys() - UNCOMPARED:
            assert there[key] == pytest.approx(here[key], rel=tolerance, abs=1e-4), (here["step"], key)


@pytest.fixture(scope="module")
def on_cpu(photo_shards, tmp_path_factory):
    """The steps of a run on the CPU that is never interrupted."""
    return train(CPU, photo_shards, tmp_path_factory.mktemp("cpu"), PLAIN)


@pytest.fixture(scope="module")
def runs(photo_shards, gpu, tmp_path_factory):
    """(folder, losses by name) of the same training by every engine, on the GPU."""
    out = tmp_path_factory.mktemp("engines")
    no_codebook = ["model.quantizer.entropy.dataset_weight=0"]
    more = {
        "whole": [*PLAIN, *no_codebook],
        "accumulated ddp": [*PLAIN, *no_codebook, "training.micro_batch_size=4"],
        "accumulated zero 1": [*no_codebook, "training.micro_batch_size=4"],
        "clipped ddp": [*PLAIN, "training.optimizer.gradient_clip=0.01"],
        "clipped zero 2": ["training.engine.zero_stage=2", "training.optimizer.gradient_clip=0.01"],
    }
    losses = {name: train(gpu, photo_shards, out / name, overrides) for name, overrides in (ENGINES | more).items()}
    return str(out), losses


def test_the_first_losses_are_those_of_a_cpu(runs, on_cpu):
    assert_close(runs[1]["ddp"], on_cpu)
    assert len(on_cpu) == STEPS
    assert "r1" in on_cpu[1]


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_deepspeed_takes_the_steps_that_plain_data_parallelism_takes(runs, engine):
    assert_same_run(*runs, "ddp", engine, tolerance=1e-4)


@pytest.mark.parametrize("engine", ["accumulated ddp", "accumulated zero 1"])
def test_accumulated_micro_batches_are_one_whole_batch(runs, engine):
    assert_same_run(*runs, "whole", engine, tolerance=1e-3, uncompared={"codebook_entropy"})


def test_clipping_is_the_same_for_both_engines_and_does_something(runs):
    assert_same_run(*runs, "clipped ddp", "clipped zero 2", tolerance=1e-4)
    assert runs[1]["clipped ddp"][-1]["loss"] != runs[1]["ddp"][-1]["loss"]


@pytest.mark.parametrize("engine", ["ddp", "zero 0", "zero 1", "zero 2", "zero 3"])
def test_bf16_stays_finite_and_near_fp32(runs, engine, gpu, photo_shards, tmp_path):
    overrides = [*ENGINES[engine], "training.engine.precision=bf16"]
    for half, whole in zip(train(gpu, photo_shards, tmp_path, overrides), runs[1]["ddp"], strict=True):
        assert half["reconstruction"] == pytest.approx(whole["reconstruction"], rel=0.02)
        assert half["loss"] == pytest.approx(whole["loss"], rel=0.05)
        assert half["loss"] != whole["loss"], "it is bf16"


@pytest.mark.parametrize("engine", ["ddp", "zero 1"])
def test_compiled_blocks_take_the_same_steps(runs, engine, gpu, photo_shards, tmp_path):
    torch._dynamo.reset()
    compiled = train(gpu, photo_shards, tmp_path, [*ENGINES[engine], "training.engine.compile=true"])
    # Fused kernels round otherwise, and a bit near zero that flips shows in the second step's gradient.
    assert_close(compiled[:1], runs[1][engine][:1])
    assert_close(compiled, runs[1][engine], tolerance=0.01)


@pytest.mark.parametrize("engine", ["ddp", "zero 1", "zero 3"])
def test_a_continued_run_is_the_one_that_was_never_interrupted(runs, engine, gpu, photo_shards, tmp_path):
    stopped = train(gpu, photo_shards, tmp_path / "continued", ENGINES[engine], last=STEPS // 2)
    checkpoint = tmp_path / "continued" / "checkpoints" / list_checkpoints(str(tmp_path / "continued"))[-1]
    assert "cuda" in torch.load(checkpoint / "rng-0.pt", weights_only=True)
    continued = train(gpu, photo_shards, tmp_path / "continued", ENGINES[engine])
    (tmp_path / "whole").symlink_to(f"{runs[0]}/{engine}")
    losses = {"continued": stopped + continued, "whole": runs[1][engine]}
    assert [record["step"] for record in losses["continued"]] == list(range(1, STEPS + 1))
    assert_same_run(str(tmp_path), losses, "whole", "continued", tolerance=1e-4)


@pytest.mark.parametrize("from_gpu", [True, False], ids=["gpu to cpu", "cpu to gpu"])
def test_the_other_device_goes_on_where_one_stopped(on_cpu, from_gpu, gpu, photo_shards, tmp_path):
    first, second = (gpu, CPU) if from_gpu else (CPU, gpu)
    stopped = train(first, photo_shards, tmp_path, PLAIN, last=STEPS // 2)
    assert_close(stopped + train(second, photo_shards, tmp_path, PLAIN), on_cpu)


def command(shards, out, device, *more):
    """Trains by the command line without Ray; the records of the run."""
    arguments = ["train", "tokenizer", "--config", PRESET, "--data", shards, "--out", str(out), "--workers", "0"]
    arguments += ["--device", device, *more, *SMALL, *STEADY, "training.schedule.final=1"]
    call = [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_command_trains_with_deepspeed_on_the_device_that_it_is_given(gpu, photo_shards, tmp_path):
    records = command(photo_shards, tmp_path, "gpu", "training.steps=2")
    assert records[0]["device"] == str(gpu)
    records = command(photo_shards, tmp_path, "cpu", "--resume")
    assert [record["device"] for record in records if record["kind"] == "start"] == [str(gpu), "cpu"]
    found = [record for record in records if record["kind"] == "training"]
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    whole = command(photo_shards, tmp_path / "whole", "gpu")
    assert_close(found, [record for record in whole if record["kind"] == "training"])


def test_deepspeed_refuses_a_second_kind_of_device_in_a_process(runs, photo_shards, tmp_path):
    with pytest.raises(ValueError, match=r"DeepSpeed computes on cuda in this process and cannot train on cpu too"):
        train(CPU, photo_shards, tmp_path)
