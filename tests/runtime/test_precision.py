"""fp32 on a GPU has full precision instead of TF32."""

import pytest
import torch
from small_runs import RecordingReporter, local_worker, small_spec

from bsq_ray.training.trainer import run_training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_disables_tf32(precision, photo_shards, tmp_path, monkeypatch):
    """Training disables TF32 for every precision; with bf16 it concerns the operations outside autocast."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    spec = small_spec(photo_shards, tmp_path, ["training.steps=1", f"training.engine.precision={precision}"])
    run_training(spec, local_worker(RecordingReporter()))
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"
