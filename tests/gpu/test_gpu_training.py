"""Test training on a GPU: the losses of a CPU, the same steps by every engine, resuming on either device."""

import json
import subprocess
import sys

import pytest
import torch
from small_runs import PRESET, SMALL, STEPS, RecordingReporter, small_spec
from test_engine import ENGINES, UNCOMPARED, assert_same_run

from bsq_ray.training.checkpoints.writer import list_checkpoints
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import WorkerContext

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
DDP = ENGINES["ddp"]
# Otherwise gradients that are nothing but rounding move their weights as far as others do, each device its own way.
STABLE_OPTIMIZER = ["training.optimizer.eps=1e-4"]
# The R1 penalty's second derivatives amplify the last digits.
RELATIVE_TOLERANCE = 2e-3


def train(device, shards, out, overrides=(), last=None):
    """Return the records of the steps; runs in one folder resume from each other."""
    listener = RecordingReporter(last)
    run_training(
        small_spec(shards, out, [*STABLE_OPTIMIZER, *overrides]), WorkerContext(0, 1, device, "local", listener)
    )
    return listener.training_records


def assert_close(actual, expected, tolerance=RELATIVE_TOLERANCE):
    """Losses, entropies and gradient norms of each step."""
    for actual_record, expected_record in zip(actual, expected, strict=True):
        assert actual_record.keys() == expected_record.keys()
        for key in expected_record.keys() - UNCOMPARED:
            assert actual_record[key] == pytest.approx(expected_record[key], rel=tolerance, abs=1e-4), (
                expected_record["step"],
                key,
            )


@pytest.fixture(scope="module")
def cpu_records(photo_shards, tmp_path_factory):
    """The steps of a run on the CPU that is never interrupted."""
    return train(CPU, photo_shards, tmp_path_factory.mktemp("cpu"), DDP)


@pytest.fixture(scope="module")
def runs(photo_shards, gpu, tmp_path_factory):
    """(folder, losses by name) of the same training by every engine, on the GPU."""
    out = tmp_path_factory.mktemp("engines")
    no_codebook = ["model.quantizer.entropy.codebook_weight=0"]
    more = {
        "whole": [*DDP, *no_codebook],
        "accumulated ddp": [*DDP, *no_codebook, "training.micro_batch_size=4"],
        "accumulated zero 1": [*no_codebook, "training.micro_batch_size=4"],
        "clipped ddp": [*DDP, "training.optimizer.max_grad_norm=0.01"],
        "clipped zero 2": ["training.engine.zero_stage=2", "training.optimizer.max_grad_norm=0.01"],
    }
    losses = {name: train(gpu, photo_shards, out / name, overrides) for name, overrides in (ENGINES | more).items()}
    return str(out), losses


def test_training_first_losses_match_cpu(runs, cpu_records):
    assert_close(runs[1]["ddp"], cpu_records)
    assert len(cpu_records) == STEPS
    assert "r1" in cpu_records[1]


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_deepspeed_steps_match_ddp(runs, engine):
    """Every DeepSpeed stage takes the same steps as plain data parallelism."""
    assert_same_run(*runs, "ddp", engine, tolerance=1e-4)


@pytest.mark.parametrize("engine", ["accumulated ddp", "accumulated zero 1"])
def test_gradient_accumulation_matches_full_batch(runs, engine):
    assert_same_run(*runs, "whole", engine, tolerance=1e-3, uncompared={"codebook_entropy"})


def test_gradient_clipping_matches_across_engines(runs):
    """Gradient clipping has the same effect with DDP and DeepSpeed, and it changes the losses."""
    assert_same_run(*runs, "clipped ddp", "clipped zero 2", tolerance=1e-4)
    assert runs[1]["clipped ddp"][-1]["loss"] != runs[1]["ddp"][-1]["loss"]


@pytest.mark.parametrize("engine", ["ddp", "zero 0", "zero 1", "zero 2", "zero 3"])
def test_training_bf16_stays_close_to_fp32(runs, engine, gpu, photo_shards, tmp_path):
    overrides = [*ENGINES[engine], "training.engine.precision=bf16"]
    for half, whole in zip(train(gpu, photo_shards, tmp_path, overrides), runs[1]["ddp"], strict=True):
        assert half["reconstruction"] == pytest.approx(whole["reconstruction"], rel=0.02)
        assert half["loss"] == pytest.approx(whole["loss"], rel=0.05)
        assert half["loss"] != whole["loss"], "it is bf16"


@pytest.mark.parametrize("engine", ["ddp", "zero 1"])
def test_training_compiled_blocks_match_eager(runs, engine, gpu, photo_shards, tmp_path):
    torch._dynamo.reset()
    compiled = train(gpu, photo_shards, tmp_path, [*ENGINES[engine], "training.engine.compile=true"])
    # Fused kernels round otherwise, and a bit near zero that flips shows in the second step's gradient.
    assert_close(compiled[:1], runs[1][engine][:1])
    assert_close(compiled, runs[1][engine], tolerance=0.01)


@pytest.mark.parametrize("engine", ["ddp", "zero 1", "zero 3"])
def test_resume_on_gpu_matches_uninterrupted_run(runs, engine, gpu, photo_shards, tmp_path):
    stopped = train(gpu, photo_shards, tmp_path / "continued", ENGINES[engine], last=STEPS // 2)
    checkpoint = tmp_path / "continued" / "checkpoints" / list_checkpoints(str(tmp_path / "continued"))[-1]
    assert "cuda" in torch.load(checkpoint / "rng-0.pt", weights_only=True)
    continued = train(gpu, photo_shards, tmp_path / "continued", ENGINES[engine])
    (tmp_path / "whole").symlink_to(f"{runs[0]}/{engine}")
    losses = {"continued": stopped + continued, "whole": runs[1][engine]}
    assert [record["step"] for record in losses["continued"]] == list(range(1, STEPS + 1))
    assert_same_run(str(tmp_path), losses, "whole", "continued", tolerance=1e-4)


@pytest.mark.parametrize("from_gpu", [True, False], ids=["gpu to cpu", "cpu to gpu"])
def test_resume_on_other_device_matches_cpu_run(cpu_records, from_gpu, gpu, photo_shards, tmp_path):
    first, second = (gpu, CPU) if from_gpu else (CPU, gpu)
    stopped = train(first, photo_shards, tmp_path, DDP, last=STEPS // 2)
    assert_close(stopped + train(second, photo_shards, tmp_path, DDP), cpu_records)


def train_by_command(shards, out, device, *more):
    """Trains by the command line without Ray; the records of the run."""
    arguments = ["train", "tokenizer", "--config", PRESET, "--data", shards, "--out", str(out), "--workers", "0"]
    arguments += ["--device", device, *more, *SMALL, *STABLE_OPTIMIZER, "training.schedule.final_factor=1"]
    call = [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_train_command_uses_the_given_device(gpu, photo_shards, tmp_path):
    """The train command uses DeepSpeed on the device it is given and resumes on another one."""
    records = train_by_command(photo_shards, tmp_path, "gpu", "training.steps=2")
    assert records[0]["device"] == str(gpu)
    records = train_by_command(photo_shards, tmp_path, "cpu", "--resume")
    assert [record["device"] for record in records if record["kind"] == "start"] == [str(gpu), "cpu"]
    actual = [record for record in records if record["kind"] == "training"]
    assert [record["step"] for record in actual] == [1, 2, 3, 4]
    whole = train_by_command(photo_shards, tmp_path / "whole", "gpu")
    assert_close(actual, [record for record in whole if record["kind"] == "training"])


def test_deepspeed_second_device_type_in_process_raises(runs, photo_shards, tmp_path):
    with pytest.raises(ValueError, match=r"DeepSpeed computes on cuda in this process and cannot train on cpu too"):
        train(CPU, photo_shards, tmp_path)
