"""The service under load, by an HTTP client: what it adds to the model's time, what it keeps of its throughput.

The neighbour is the same model called directly in this process, in turns with the service, in its best batch.
"""

import http.client
import io
import os
import statistics
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from bsq_ray import Tokenizer, config
from bsq_ray.serving.replicas.engines import TokenizerEngine
from bsq_ray.serving.server import serve_app
from bsq_ray.serving.service_config import Limits, Settings

pytestmark = pytest.mark.benchmark

# Requests of a round at concurrency 1, and all at 16.
_MODELS = {"demo": (60, 640), "imagenet128-bsq18": (3, 48), "imagenet256-bsq18": (2, 32)}
# In each the service and the model take turns: the machine's speed changes within minutes.
_ROUNDS = 7


class Client(threading.Thread):
    """Sends the same file again and again over one connection; seconds of each answer."""

    def __init__(self, url, body, count):
        super().__init__()
        host, port = url.removeprefix("http://").strip("/").split(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=300)
        self.body, self.num_requests, self.seconds = body, count, []

    def run(self):
        for _ in range(self.num_requests):
            began = time.perf_counter()
            self.connection.request("POST", "/v1/encode", self.body)
            response = self.connection.getresponse()
            response.read()
            assert response.status == 200
            self.seconds.append(time.perf_counter() - began)


def run_load(url, body, num_clients, count):
    """Seconds of all answers and images a second."""
    threads = [Client(url, body, count // num_clients) for _ in range(num_clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = sorted(second for thread in threads for second in thread.seconds)
    return seconds, len(seconds) / (time.perf_counter() - began)


def run_directly(engine, body, batch, count):
    """Seconds of each image alone (file to tokens), or images a second of batches of prepared pixels."""
    pixels = engine.prepare(body)
    if batch == 1:
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            engine.encode([engine.prepare(body)])
            seconds.append(time.perf_counter() - began)
        return seconds
    began = time.perf_counter()
    for _ in range(count // batch):
        engine.encode([pixels] * batch)
    return count // batch * batch / (time.perf_counter() - began)


@contextmanager
def serve_preset(preset, folder):
    run = config.load_config(preset)
    torch.manual_seed(0)
    Tokenizer(run.model).save_pretrained(str(folder / preset), run)
    settings = Settings(
        models={preset: str(folder / preset)}, authentication=False, limits=Limits(waiting=32, seconds=300)
    )
    began = time.perf_counter()
    with serve_app(settings, "127.0.0.1", 0) as service:
        yield str(folder / preset), service.url, time.perf_counter() - began


@pytest.mark.parametrize("preset", _MODELS)
def test_serving_speed(preset, photos, tmp_path, record_measurement):
    file = io.BytesIO()
    photos[0].save(file, "JPEG", quality=90)
    body = file.getvalue()
    alone, many = _MODELS[preset]
    with serve_preset(preset, tmp_path) as (folder, url, started):
        torch.set_num_threads(os.cpu_count())
        engine = TokenizerEngine(folder, "cpu", 16, Limits())
        run_load(url, body, 16, 16)
        run_load(url, body, 1, 2)
        rounds = [(run_load(url, body, 1, alone)[0], run_directly(engine, body, 1, alone)) for _ in range(_ROUNDS)]
        best = max(run_directly(engine, body, batch, max(batch, many // 4)) for batch in (2, 4, 8, 16))
        seconds, rate = run_load(url, body, 16, many)
        best = max(best, *(run_directly(engine, body, batch, max(batch, many // 4)) for batch in (2, 4, 8, 16)))
        torch.set_num_threads(2)
    pairs = [tuple(1e3 * statistics.median(side) for side in pair) for pair in rounds]
    service, model = (statistics.median(side) for side in zip(*pairs, strict=True))
    added = sorted(with_service - without for with_service, without in pairs)
    record_measurement(
        f"service, {preset}, one request at a time: p50",
        f"{service:.1f} ms",
        f"the model alone {model:.1f} ms: {statistics.median(added):.1f} ms more ({added[0]:.1f} to {added[-1]:.1f})",
    )
    p50, p99 = (1e3 * seconds[int(len(seconds) * share)] for share in (0.5, 0.99))
    record_measurement(
        "… 16 at a time: throughput, p50, p99",
        f"{rate:.3g} images/s, {p50:.0f} ms, {p99:.0f} ms",
        f"the model alone in its best batch {best:.3g} images/s: {rate / best:.2f} of it",
    )
    record_measurement("… from nothing to the first answer, Ray included", f"{started:.1f} s")
