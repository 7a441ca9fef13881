"""Plans of large runs, and costs of large data sets extrapolated from the measured growth."""

import json

import pytest
from result_files import RESULTS

from bsq_ray import config
from bsq_ray.planning import make_plan

pytestmark = pytest.mark.benchmark
_PER_GPU = 16
_DATA_SETS = {"ImageNet-1k": 1_281_167, "ImageNet-21k": 14_197_122, "100 M": 100_000_000}


@pytest.mark.parametrize("preset", ["imagenet128-bsq18", "imagenet256-bsq18"])
@pytest.mark.parametrize("num_gpus", [16, 64, 512])
def test_plan_of_large_runs(preset, num_gpus, record):
    run = config.load_config(preset, [f"training.batch_size={_PER_GPU * num_gpus}"])
    slow, fast = (make_plan(run, "h100", num_gpus, network_gbit=gbit) for gbit in (25, 400))
    assert slow.micro_batch_size == _PER_GPU
    record(
        "scale-plan",
        f"{preset} {num_gpus}",
        compute_s=slow.compute_s,
        sent_gb=slow.communication_bytes / 1e9,
        slow_network_s=slow.communication_s,
        slow_images_per_s=round(slow.samples_per_second),
        fast_network_s=fast.communication_s,
        fast_images_per_s=round(fast.samples_per_second),
        data_mb_per_s=fast.data_bytes_per_second / 1e6,
        epoch_1k_min=_DATA_SETS["ImageNet-1k"] / fast.samples_per_second / 60,
        epoch_21k_h=_DATA_SETS["ImageNet-21k"] / fast.samples_per_second / 3600,
        epoch_100m_h=_DATA_SETS["100 M"] / fast.samples_per_second / 3600,
    )


def largest_row(benchmark):
    """Return the row of the largest measured size."""
    return json.loads((RESULTS / f"{benchmark}.json").read_text())["rows"][-1]


@pytest.mark.parametrize("name", _DATA_SETS)
def test_extrapolated_costs_of_data_sets(name, record):
    images, packing, evaluation = (
        _DATA_SETS[name],
        largest_row("growth-packing-cpu"),
        largest_row("growth-evaluation-cpu"),
    )
    record(
        "scale-estimates",
        name,
        list_mb=packing["list_bytes_per_file"] * images / 1e6,
        list_cpu_min=packing["list_us_per_file"] * images / 60e6,
        pack_cpu_h=packing["pack_ms_per_image"] * images / 3.6e6,
        shards_tb=packing["mb_per_1000_images"] * images / 1e9,
        feature_files_gb=images * (2048 + 1280) * 4 / 1e9,
        sums_cpu_h=images / evaluation["part_images_per_s"] / 3600,
        nearest_cpu_h=evaluation["nearest_cpu_s_per_1e9_pairs"] * images * 50_000 / 1e9 / 3600,
    )
