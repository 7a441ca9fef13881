"""A sweep's folder says which sweep it holds; one that does not say so any more is not gone on with."""

import pytest
from small_sweeps import small_sweep

from bsq_ray.tuning.run_sweep import run_sweep


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "name: [", "name: small\n", "budget: 3\nmetrics: {psnr: max}\n", "\x00"]
)
def test_run_sweep_damaged_sweep_file_raises(text, tmp_path, photo_shards, held_out_shards):
    """A damaged sweep.yaml in the output folder raises one clear error."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"out/sweep.yaml is damaged and does not say which sweep is there; put"):
        run_sweep(small_sweep(tmp_path), photo_shards, held_out_shards, str(out), resume=True)
