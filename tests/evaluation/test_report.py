"""The report of a run: every value that the template names is in the files that a run and an evaluation write."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from bsq_ray.config import dump_config, load_config
from bsq_ray.evaluation.provenance import collect_provenance
from bsq_ray.evaluation.report import write_report
from bsq_ray.training.run_spec import RunResult

METRICS = {"bits_per_pixel": 0.28, "psnr": 20.5, "ssim": 0.6, "lpips": 0.3}


@pytest.fixture
def write_folders(tmp_path):
    """Function that writes a run folder and an evaluation folder of images or videos."""

    def write(kind, preset):
        result = RunResult(
            step=120, is_finished=True, duration_s=90.0, images_per_second=51.5, data_wait_fraction=0.012
        )
        records = [{"kind": "training", "step": step, "loss": 1 / step, "progress": 0.5} for step in (1, 2, 3)]
        provenance = collect_provenance(
            SimpleNamespace(url="shards", hash="0" * 64, kind=kind, packing=None),
            40,
            size=64,
            resize_filter="lanczos",
            networks=[],
        )
        results = {"model_id": "1" * 64, "rows": {"model": METRICS, "mean color": METRICS}, "provenance": provenance}
        if kind == "videos":
            results["per_frame"] = {"model": {"psnr": [20.0, 21.0], "lpips": [0.3, 0.2]}}
        (tmp_path / "evaluation").mkdir()
        (tmp_path / "config.yaml").write_text(dump_config(load_config(preset)))
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        (tmp_path / "summary.json").write_text(json.dumps({**asdict(result), "restarts": 3, "workers": 2}))
        (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
        for suffix in ("png", "webp"):
            (tmp_path / "evaluation" / f"reconstructions.{suffix}").write_bytes(b"image")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("kind", "preset", "expected"),
    [("images", "demo", "51.5 images per second"), ("videos", "demo-video", "51.5 clips per second")],
)
def test_write_report_shows_summary_and_metrics(write_folders, kind, preset, expected):
    """Totals of the run and metrics of the evaluation are in the report."""
    folder = write_folders(kind, preset)
    write_report(str(folder), str(folder / "evaluation"), str(folder / "report.html"))
    html = " ".join((folder / "report.html").read_text().split())
    for text in (expected, "with 2 workers", "1.2 % of the time waiting for data; 3 restarts", "20.50 dB", "120 steps"):
        assert text in html
