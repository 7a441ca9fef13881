"""Benchmarks record measurements: a table at the end of the run, and rows of docs/results/*.json."""

from pathlib import Path

import pytest
import torch
from gpu_timing import DRY_RUN
from result_files import write_results

from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.demos.prepare_data import PHOTOS
from bsq_ray.samples.labeled_photos import collect_labeled_photos

# Measurements take minutes on a quiet machine, and their baselines longer.
_TIMEOUT_S = 3600
_TABLE = pytest.StashKey[list[tuple[str, str, str]]]()
_RESULTS = pytest.StashKey[dict[str, dict[str, dict]]]()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(_TIMEOUT_S))


@pytest.fixture(scope="module")
def single_thread():
    """One thread of PyTorch, so that two benchmarks can run at once on two cores."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(scope="session")
def labeled_shards(tmp_path_factory):
    """URLs of the labeled photos of the generation demo, packed: training and held-out."""
    out = tmp_path_factory.mktemp("labeled")
    urls = []
    for folder in collect_labeled_photos(out / "photos", out / "packages"):
        urls.append(str(out / "shards" / folder.name))
        pack_images(str(folder), urls[-1], PackOptions(max_side=PHOTOS.max_side, num_workers=0))
    return urls


@pytest.fixture
def record_measurement(request):
    """Add a row to the printed table: what was measured, its value, and the baseline of the same run."""

    def add(what, value, comparison=""):
        request.config.stash.setdefault(_TABLE, []).append((what, value, comparison))

    return add


@pytest.fixture
def record(request):
    """Set values of a row of docs/results/BENCHMARK.json, by the keys of its columns."""

    def add(benchmark, row_id, **values):
        rows = request.config.stash.setdefault(_RESULTS, {}).setdefault(benchmark, {})
        rows.setdefault(row_id, {}).update(values)

    return add


def pytest_terminal_summary(terminalreporter, config):
    results = {} if DRY_RUN else config.stash.get(_RESULTS, {})
    for name, rows in results.items():
        terminalreporter.section(name)
        for row_id, values in rows.items():
            terminalreporter.write_line(f"{row_id}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
        if kept := write_results(name, rows):
            terminalreporter.write_line(f"docs/results/{name}.json: not measured in this run: {', '.join(kept)}")
    table = config.stash.get(_TABLE, [])
    if table:
        terminalreporter.section("measurements")
        for row in (("what", "value", "comparison"), ("---", "---", "---"), *table):
            terminalreporter.write_line(f"| {' | '.join(row)} |")
