"""fp32 is no TF32, which PyTorch's convolutions use on a GPU unless they are told otherwise."""

import pytest
import torch
from small_runs import RecordingReporter, local_worker, small_job

from bsq_ray.training.trainer import run_training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_disables_tf32(precision, photo_shards, tmp_path, monkeypatch):
    """With bf16 that is what autocast leaves alone, and the measures."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    job = small_job(photo_shards, tmp_path, ["training.steps=1", f"training.engine.precision={precision}"])
    run_training(job, local_worker(RecordingReporter()))
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"
