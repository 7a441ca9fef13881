"""Growth of listing and packing a folder of images with its number of files."""

import io
import os
import time
import tracemalloc

import pyarrow as pa
import pytest

from bsq_ray.data.file_list import list_files
from bsq_ray.data.pack import PackOptions, pack_images

pytestmark = pytest.mark.benchmark
_BENCHMARK, _NUM_CLASSES = "growth-packing-cpu", 100


def make_folder(folder, photos, num_files):
    """Make a folder of links to a few JPEG files of the size of ImageNet's, in folders of classes."""
    originals = []
    for number, photo in enumerate(photos):
        file = io.BytesIO()
        photo.resize((500, 375)).save(file, "JPEG", quality=95)
        originals.append(folder / f"original-{number}")
        originals[-1].write_bytes(file.getvalue())
    for n in range(num_files):
        path = folder / "images" / f"class-{n % _NUM_CLASSES:03}" / f"{n:012}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[n % len(originals)], path)
    return str(folder / "images")


@pytest.mark.parametrize("num_files", [1000, 4000, 16_000])
def test_growth_of_packing(num_files, photos, tmp_path, record):
    folder = make_folder(tmp_path, photos, num_files)
    # The first call loads libraries.
    list_files(folder, "images", (".jpg",))
    tracemalloc.start()
    arrow_bytes = pa.total_allocated_bytes()
    listed = list_files(folder, "images", (".jpg",))
    held_bytes = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow_bytes
    tracemalloc.stop()
    start = time.process_time()
    list_files(folder, "images", (".jpg",))
    list_s = time.process_time() - start
    start = time.process_time()
    report = pack_images(folder, str(tmp_path / "shards"), PackOptions(num_workers=0))
    pack_s = time.process_time() - start
    assert report.manifest.num_samples == len(listed.names) == num_files
    record(
        _BENCHMARK,
        str(num_files),
        list_us_per_file=1e6 * list_s / num_files,
        list_bytes_per_file=held_bytes / num_files,
        pack_ms_per_image=1e3 * pack_s / num_files,
        mb_per_1000_images=report.manifest.num_bytes / 1e3 / num_files,
    )
