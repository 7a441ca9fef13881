"""fp32 is no TF32, which PyTorch's convolutions use on a GPU unless they are told otherwise."""

import pytest
import torch
from small_runs import Listener, in_this_process, small_job

from bsq_ray.training.trainer import run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_run_multiplies_in_fp32_is_not_rounded(precision, photo_shards, tmp_path, monkeypatch):
    """With bf16 that is what autocast leaves alone, and the measures."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    job = small_job(photo_shards, tmp_path, ["training.steps=1", f"training.engine.precision={precision}"])
    run(job, in_this_process(Listener()))
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"
