"""All files of a run in an object store: shards, checkpoints, models, token tables, reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bsq_ray import Tokenizer, storage
from bsq_ray.config import load_config
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.token_table import read_table
from bsq_ray.data.tokenize import tokenize
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.evaluation.report import write_report
from bsq_ray.training.checkpoints.writer import list_checkpoints
from bsq_ray.training.launch import train

SMALL_TRAINING = [
    *("model.image_size=32", "model.patch_size=8", "model.quantizer.bits=10", "model.decoder.head_hidden_dim=32"),
    *(f"model.{half}.{key}" for half in ("encoder", "decoder") for key in ("width=32", "layers=1", "heads=2")),
    *("loss.perceptual_weight=0", "loss.adversarial.weight=0", "training.steps=2", "training.batch_size=4"),
    *("training.eval_samples=16", "training.engine.precision=fp32", "training.schedule.warmup_steps=0"),
]
SMALL_TOKENS = [
    *("model.grid=[1,4,4]", "model.bits=10", "model.sub_bits=5", "model.num_classes=1"),
    *("model.width=32", "model.layers=1", "model.heads=2", "sampling.steps=2"),
    *("training.steps=2", "training.batch_size=4", "training.schedule.warmup_steps=0"),
]


def ignore_record(record):
    pass


def test_pipeline_runs_entirely_on_object_storage(photo_folders, bucket):
    """Packing, training, evaluation, tokenization and the report work without a local folder."""
    shards, run, table, lm = (f"{bucket}/{name}" for name in ("shards", "run", "tokens", "lm"))
    pack_images(str(photo_folders[1]), shards, PackOptions(max_side=64, num_workers=0))
    train(load_config("demo-gan", SMALL_TRAINING), shards, run, 0, on_record=ignore_record)
    assert list_checkpoints(run) == ["step-0000002"]
    assert json.loads(storage.read_bytes(f"{run}/summary.json"))["step"] == 2
    assert storage.list_folder(f"{run}/tensorboard")
    evaluate_reconstruction(f"{run}/model", shards, f"{bucket}/evaluation", workers=0)
    assert "| mean color" in storage.read_bytes(f"{bucket}/evaluation/results.md").decode()
    write_report(run, f"{bucket}/evaluation", f"{bucket}/report.html")
    assert b"<html" in storage.read_bytes(f"{bucket}/report.html")
    tokenize(f"{run}/model", shards, table, num_workers=0)
    assert read_table(table).num_rows == sum(1 for path in photo_folders[1].iterdir())
    train(load_config("masked-lm-demo", SMALL_TOKENS), table, lm, 0, held_out_url=table, on_record=ignore_record)
    assert storage.exists(f"{lm}/model/model.safetensors")
    Tokenizer.from_pretrained(f"{lm}/model/tokenizer")


@pytest.mark.slow
@pytest.mark.long
def test_ray_training_on_object_storage_resumes(photo_folders, bucket):
    """Ray workers train from and to an object store, and a run resumes there, also without Ray."""
    pack_images(str(photo_folders[1]), f"{bucket}/shards", PackOptions(max_side=64, num_workers=0))
    command = [
        sys.executable,
        "-c",
        "from bsq_ray.cli.main import main; main()",
        "train",
        "tokenizer",
        "--config",
        "demo-gan",
    ]
    command += ["--data", f"{bucket}/shards", "--out", f"{bucket}/run", "--resume"]
    for workers, steps in ((2, 2), (0, 3)):
        options = ["--workers", str(workers), *SMALL_TRAINING, f"training.steps={steps}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"trained {steps} steps" in done.stdout
    assert f"model: {bucket}/run/model" in done.stdout
    assert list_checkpoints(f"{bucket}/run") == ["step-0000002", "step-0000003"]
    assert not storage.exists(f"{bucket}/run/ray")
    assert not Path("s3:").exists()
