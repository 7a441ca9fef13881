"""Latency and throughput of the service under load, measured by an HTTP client.

The baseline is the same model, called directly in this process in its best batch size, alternating with the service.
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
from bsq_ray.serving.replicas.replica_runtime import ReplicaRuntime
from bsq_ray.serving.replicas.tokenizer_role import TokenizerEngine
from bsq_ray.serving.server import serve_app
from bsq_ray.serving.service_config import Batching, Limits, Settings

pytestmark = pytest.mark.benchmark

# Number of requests of a round at concurrency 1, and of all at concurrency 16.
_MODELS = {"demo": (60, 640), "imagenet128-bsq18": (3, 48), "imagenet256-bsq18": (2, 32)}
# Service and model alternate in each round, because the speed of a shared node changes within minutes.
_ROUNDS = 7


class Client(threading.Thread):
    """Sends the same file repeatedly over one connection and records the latency of each request in seconds."""

    def __init__(self, url, body, num_requests):
        super().__init__()
        host, port = url.removeprefix("http://").strip("/").split(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=300)
        self.body, self.num_requests, self.latencies_s = body, num_requests, []

    def run(self):
        for _ in range(self.num_requests):
            start_time = time.perf_counter()
            self.connection.request("POST", "/v1/encode", self.body)
            response = self.connection.getresponse()
            response.read()
            assert response.status == 200
            self.latencies_s.append(time.perf_counter() - start_time)


def measure_service(url, body, num_clients, num_requests):
    """Return sorted latencies in seconds, and images per second."""
    threads = [Client(url, body, num_requests // num_clients) for _ in range(num_clients)]
    start_time = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latencies_s = sorted(latency for thread in threads for latency in thread.latencies_s)
    return latencies_s, len(latencies_s) / (time.perf_counter() - start_time)


def measure_model_latency(engine, body, num_images):
    """Return latencies in seconds of single images, file to tokens."""
    latencies_s = []
    for _ in range(num_images):
        start_time = time.perf_counter()
        engine.encode([engine.prepare(body)])
        latencies_s.append(time.perf_counter() - start_time)
    return latencies_s


def measure_model_throughput(engine, body, num_images):
    """Return images per second, pixels to tokens, in the best batch size."""
    pixels, rates = engine.prepare(body), []
    for batch_size in (2, 4, 8, 16):
        num_batches = max(1, num_images // batch_size)
        start_time = time.perf_counter()
        for _ in range(num_batches):
            engine.encode([pixels] * batch_size)
        rates.append(num_batches * batch_size / (time.perf_counter() - start_time))
    return max(rates)


@contextmanager
def serve_preset(preset, folder):
    run_config = config.load_config(preset)
    torch.manual_seed(0)
    Tokenizer(run_config.model).save_pretrained(str(folder / preset), run_config)
    limits = Limits(max_ongoing_requests=32, request_timeout_s=300)
    settings = Settings(models={preset: str(folder / preset)}, authentication=False, limits=limits)
    start_time = time.perf_counter()
    with serve_app(settings, "127.0.0.1", 0) as server:
        yield str(folder / preset), server.url, time.perf_counter() - start_time


@pytest.mark.parametrize("preset", _MODELS)
def test_serving_speed(preset, photos, tmp_path, record):
    file = io.BytesIO()
    photos[0].save(file, "JPEG", quality=90)
    body = file.getvalue()
    num_single, num_concurrent = _MODELS[preset]
    with serve_preset(preset, tmp_path) as (folder, url, startup_s):
        torch.set_num_threads(os.cpu_count())
        engine = TokenizerEngine(folder, ReplicaRuntime.create(Batching(), Limits()))
        measure_service(url, body, 16, 16)
        measure_service(url, body, 1, 2)
        rounds_ms = []
        for _ in range(_ROUNDS):
            service_s, _ = measure_service(url, body, 1, num_single)
            model_s = measure_model_latency(engine, body, num_single)
            rounds_ms.append((1e3 * statistics.median(service_s), 1e3 * statistics.median(model_s)))
        rate_before = measure_model_throughput(engine, body, num_concurrent // 4)
        latencies_s, rate = measure_service(url, body, 16, num_concurrent)
        model_rate = max(rate_before, measure_model_throughput(engine, body, num_concurrent // 4))
        torch.set_num_threads(2)
    service_ms, model_ms = (statistics.median(column) for column in zip(*rounds_ms, strict=True))
    overheads_ms = sorted(service - model for service, model in rounds_ms)
    p50_ms, p99_ms = (1e3 * latencies_s[int(len(latencies_s) * quantile)] for quantile in (0.5, 0.99))
    record(
        "serving-cpu",
        preset,
        p50_ms=service_ms,
        model_ms=model_ms,
        overhead_ms=statistics.median(overheads_ms),
        overhead_min_ms=overheads_ms[0],
        overhead_max_ms=overheads_ms[-1],
        images_per_s=rate,
        p50_16_ms=p50_ms,
        p99_16_ms=p99_ms,
        model_images_per_s=model_rate,
        throughput_ratio=rate / model_rate,
        start_s=startup_s,
    )
