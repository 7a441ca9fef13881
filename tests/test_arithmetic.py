"""fp32 is no TF32, which PyTorch's convolutions use on a GPU unless they are told otherwise."""

import pytest
import torch
from small_runs import Listener, in_this_process, small_job

from bsq_ray.training.loop import run


@pytest.mark.parametrize(("precision", "rounds"), [("fp32", False), ("bf16", True)])
def test_a_run_in_fp32_lets_no_product_be_rounded(precision, rounds, photo_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    job = small_job(photo_shards, tmp_path, ["training.steps=1", f"training.engine.precision={precision}"])
    run(job, in_this_process(Listener()))
    assert torch.backends.cudnn.allow_tf32 is rounds
    assert torch.get_float32_matmul_precision() == "highest"
