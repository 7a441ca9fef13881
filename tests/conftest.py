"""Fixtures that tests share: one Ray session, real photos and clips, packed shards, an S3 server on loopback."""

import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

# Ray reads these when it is imported.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_DATA_LOG_LEVEL="ERROR",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_metrics_report_interval_ms="1000",
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH="bsq_ray.serving.http.response_backpressure.middlewares",
    BSQ_RAY_MAX_RESPONSE_MB="8",
    AWS_EC2_METADATA_DISABLED="true",
)
os.environ.pop("RAY_ADDRESS", None)

import hypothesis
import pytest
import torch
from integration_files import INTEGRATION

# Two processes with two threads each would wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
_EXIT_TIMEOUT_S = 120
_exit_status = 0
# A busy machine exceeds any deadline per example.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")


@pytest.fixture(scope="module", autouse=True)
def _restore_linear():
    """Restore `F.linear`, which ZeRO-3 replaces for the rest of the process."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(scope="session")
def ray_local():
    """The only Ray session of a test run."""
    from bsq_ray.runtime.ray_session import ray_session

    with ray_session(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def photo_folders(tmp_path_factory):
    """(train, held_out): folders of real photos."""
    from bsq_ray.samples.photos import collect_photos

    return collect_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def photos(photo_folders):
    """Held-out photos as RGB PIL images."""
    from PIL import Image

    return [Image.open(path).convert("RGB") for path in sorted(photo_folders[1].iterdir())]


@pytest.fixture(scope="session")
def photo_shards(photo_folders, tmp_path_factory):
    """URL of the training photos, packed in several shards."""
    from bsq_ray.data.pack import PackOptions, pack_images

    url = str(tmp_path_factory.mktemp("shards"))
    pack_images(str(photo_folders[0]), url, PackOptions(shard_mb=0.3, max_side=192, num_workers=0))
    return url


@pytest.fixture(scope="session")
def held_out_shards(photo_folders, tmp_path_factory):
    """URL of the held-out photos, packed."""
    from bsq_ray.data.pack import PackOptions, pack_images

    url = str(tmp_path_factory.mktemp("held_out"))
    pack_images(str(photo_folders[1]), url, PackOptions(shard_mb=0.3, max_side=192, num_workers=0))
    return url


@pytest.fixture(scope="session")
def video_folders(tmp_path_factory):
    """(train, held_out): folders of real clips."""
    from bsq_ray.samples.photos import collect_videos

    return collect_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="session")
def video_shards(video_folders, tmp_path_factory):
    """URL of the training clips, packed at 64 pixels, one shard each."""
    from bsq_ray.data.pack import PackOptions, pack_videos

    url = str(tmp_path_factory.mktemp("video_shards"))
    pack_videos(str(video_folders[0]), url, PackOptions(shard_mb=0.1, max_side=64, num_workers=0))
    return url


@pytest.fixture(scope="session")
def held_out_video_shards(video_folders, tmp_path_factory):
    """URL of the held-out clips, packed at 64 pixels."""
    from bsq_ray.data.pack import PackOptions, pack_videos

    url = str(tmp_path_factory.mktemp("held_out_videos"))
    pack_videos(str(video_folders[1]), url, PackOptions(max_side=64, num_workers=0))
    return url


@pytest.fixture(scope="session")
def s3_server():
    """Endpoint of an S3 server on loopback; environment variables contain endpoint and credentials, as for users."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=1).close()
            break
        except OSError:
            time.sleep(0.2)
    os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing")
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    yield endpoint
    server.terminate()
    server.wait()


@pytest.fixture
def bucket(s3_server):
    """A fresh bucket, as s3:// URL."""
    import uuid

    import boto3

    name = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


def pytest_addoption(parser):
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite tests/golden/ with the measured values")
    parser.addoption("--fuzz", type=int, help="number of damaged files in the long tests of codec and readers")


def pytest_configure(config):
    # All other tests run without a GPU: DeepSpeed uses one kind of device per process.
    if not any("gpu" in argument for argument in (config.getoption("markexpr"), *config.args)):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """End the process if a thread of a test never ends: the interpreter would wait for it forever."""
    global _exit_status
    threading.Thread(target=_end_process, args=(_exit_status,), daemon=True).start()


def pytest_sessionfinish(exitstatus):
    global _exit_status
    _exit_status = int(exitstatus)


def _end_process(status):
    time.sleep(_EXIT_TIMEOUT_S)
    print(f"the process did not end within {_EXIT_TIMEOUT_S} s after the tests; its threads:", file=sys.stderr)
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    os._exit(status)


def pytest_collection_modifyitems(items):
    for item in items:
        if "ray_local" in item.fixturenames:
            item.add_marker(pytest.mark.ray)
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(INTEGRATION):
            item.add_marker(pytest.mark.integration)
        # Keywords also contain the names of folders.
        is_dry_run = item.get_closest_marker("benchmark") and os.environ.get("GPU_DRY_RUN") == "1"
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not is_dry_run:
            item.add_marker(pytest.mark.skip(reason="needs a visible CUDA GPU, as in `make test-gpu`"))
